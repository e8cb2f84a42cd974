"""Blocks of a streamed source that go on exactly where an earlier run stopped."""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from torch.utils.data import IterableDataset

from complexity_lm.hub import first_line
from inl_core.run.errors import UserError
from inl_core.run.files import file_aside
from inl_core.run.json_files import fits, read_json_object

POSITION_FILE = "data_position.json"
"""In a checkpoint of a streamed run: where its data goes on."""

_KEPT_NOTES = 64


class BlockStream(IterableDataset):
    """Endless blocks: after the last document the source is read again from the first.

    The loader reads ahead of the training, so the position at a checkpoint is not where the stream
    is by then. Every `every` blocks the stream notes where it is; a checkpoint after n blocks keeps
    the last note at or before n, and a resumed run reads on from there and skips up to n.

    Args:
        blocks: Packed blocks as `data.pack` makes them of a stream.
        every: Blocks between notes; the global batch, so that checkpoints fall on notes.
    """

    def __init__(self, blocks: datasets.IterableDataset, every: int) -> None:
        super().__init__()
        self.blocks, self.every = blocks, every
        self.beginning = blocks.state_dict()
        self.skip = 0
        self.notes = deque([(0, self.beginning)], maxlen=_KEPT_NOTES)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, state = self.notes[-1]
        self.blocks.load_state_dict(state)
        wanted, self.skip = self.skip, 0
        try:
            while True:
                before = count
                for block in self.blocks:
                    count += 1
                    # Noted as it is yielded: the state is the one behind this block.
                    if count % self.every == 0:
                        self.notes.append((count, self.blocks.state_dict()))
                    if count > wanted:
                        yield block
                if count == before and state is self.beginning:
                    raise UserError("the stream holds no block; give more text")
                state = self.beginning
                self.blocks.load_state_dict(state)
        except (OSError, DatasetsError) as error:
            raise UserError(
                f"the stream broke off after block {count}: {first_line(error)}; go on from the "
                "last checkpoint with --resume auto"
            ) from error

    def save(self, folder: Path, consumed: int) -> None:
        """Write the position after `consumed` blocks into a checkpoint folder."""
        count, state = max((note for note in self.notes if note[0] <= consumed), key=lambda n: n[0])
        with file_aside(folder / POSITION_FILE) as aside:
            aside.write_text(json.dumps({"consumed": consumed, "noted": count, "state": state}))

    def load(self, folder: Path) -> None:
        """Let the next iteration start where `save` was called.

        Raises:
            UserError: There is no position in the folder, or it is unreadable.
        """
        try:
            position = read_json_object(folder / POSITION_FILE)
            consumed, noted = position["consumed"], position["noted"]
            if not fits([consumed, noted], list[int]) or not 0 <= noted <= consumed:
                raise ValueError(f"{noted!r} and {consumed!r} blocks")
            self.blocks.load_state_dict(position["state"])  # refuses another stream's
            self.skip = consumed
            self.notes.append((noted, position["state"]))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder} says nothing about the position in the stream ({first_line(error)}): "
                "its run read another kind of source"
            ) from error
