"""Captions in a training: their tokens, and the encoder that reads them."""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from complexity_dit.config import TrainConfig
from complexity_dit.data.captions import Captions
from complexity_dit.models.adapters import blank_copy
from complexity_dit.models.text import build_text_encoder, optional_package, text_width
from complexity_dit.seeding import derive_seed

logger = logging.getLogger(__name__)

TEXT_INPUTS = ("input_ids", "attention_mask", "encoder_hidden_states", "encoder_attention_mask")
"""Of a batch: tokens of the captions, for `PromptedNetwork`, or their features, for a network."""

_CHUNK = 16
"""Captions that a frozen encoder reads at a time, always as many: its bits depend on it."""

_MULTIPLE = 8
"""Batches of captions are as long as their longest one, in steps of so many tokens."""

CACHE_BYTES = 2**30
"""Features of captions that are kept; beyond it, those go that were not used for longest."""


def caption_tokens(
    tokenizer: Any, captions: Sequence[str], max_length: int, cut: bool = True
) -> tuple[Tensor, Tensor]:
    """Ids and mask of captions, int64 and bool (B, T).

    T is `max_length` or, with `cut`, the next multiple of 8 above the longest caption. The mask of
    an empty caption is empty: the network then reads its null text.
    """
    tokens = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=max_length,
        padding_side="right", return_tensors="pt",
    )  # fmt: skip
    ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
    mask &= torch.tensor([bool(text) for text in captions])[:, None]
    if not cut:
        return ids, mask
    length = max(1, -(-int(mask.sum(dim=1).max()) // _MULTIPLE)) * _MULTIPLE
    return ids[:, :length].contiguous(), mask[:, :length].contiguous()


def encode_tokens(encoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states (B, T, C) of tokens; those outside of the mask have no meaning."""
    # Attention over nothing is not a number, and neither is its gradient.
    nothing = ~attention_mask.any(dim=1, keepdim=True)
    first = torch.arange(attention_mask.shape[1], device=attention_mask.device) == 0
    mask = (attention_mask | (nothing & first)).long()
    return encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state


class PromptedNetwork(nn.Module):
    """A network and the text encoder that is trained with it, as one model."""

    def __init__(self, network: Any, text_encoder: Any) -> None:
        super().__init__()
        self.network, self.text_encoder = network, text_encoder
        text_encoder.config.use_cache = False  # of keys and values, which nothing would read

    @property
    def config(self) -> Mapping[str, Any]:
        """That of the network."""
        return self.network.config

    def blank_copy(self) -> "PromptedNetwork":
        """A newly initialised one of the same structure."""
        encoder = self.text_encoder
        return PromptedNetwork(blank_copy(self.network), type(encoder)(encoder.config))

    def forward(
        self,
        *inputs: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The network's output for its inputs and the tokens of captions, (B, T)."""
        if input_ids is not None and attention_mask is not None:
            states = encode_tokens(self.text_encoder, input_ids, attention_mask)
            options |= {"encoder_hidden_states": states, "encoder_attention_mask": attention_mask}
        return self.network(*inputs, **options)


class FrozenEncoder:
    """Features of captions by an encoder that is not trained, each computed once.

    A caption has the same bits in every batch: it is read in chunks of a fixed size.

    Args:
        encoder: The encoder, on the device of the training.
        max_length: Tokens of a caption at most.
    """

    def __init__(self, encoder: Any, max_length: int) -> None:
        self.encoder, self.max_length = encoder.eval().requires_grad_(False), max_length
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with features (B, T, C) and their mask in place of its tokens."""
        batch = dict(batch)
        ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
        lengths = mask.sum(dim=1).tolist()
        keys = [row[:n].tobytes() for row, n in zip(ids.cpu().numpy(), lengths, strict=True)]
        needed = {key: i for i, key in enumerate(keys) if key}  # an empty caption has no features
        found = {key: self._kept[key] for key in needed if key in self._kept}
        missing = [key for key in needed if key not in found]
        for start in range(0, len(missing), _CHUNK):
            chunk = [needed[key] for key in missing[start : start + _CHUNK]]
            padding = (0, self.max_length - ids.shape[1], 0, _CHUNK - len(chunk))
            read = encode_tokens(
                self.encoder, F.pad(ids[chunk], padding), F.pad(mask[chunk], padding)
            )
            for i, row in zip(chunk, read, strict=False):
                found[keys[i]] = row[: lengths[i]].clone()
        states = torch.zeros(*ids.shape, text_width(self.encoder), device=ids.device)
        for i, key in enumerate(keys):
            if key:
                states[i, : lengths[i]] = found[key]
        for key in needed:
            self._keep(key, found[key])
        return batch | {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _keep(self, key: bytes, states: Tensor) -> None:
        """Keep features as the ones used last, and let go of others that have no room."""
        if key not in self._kept:
            self._bytes += states.nbytes
        self._kept[key] = states
        self._kept.move_to_end(key)
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


def text_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text of a batch, by the names that a network takes it by."""
    return {name: batch[name] for name in TEXT_INPUTS if name in batch}


_MAX_READ = 50_000
"""Pictures whose captions a new tokenizer is trained on."""


def seeded_text_encoder(
    config: TrainConfig, captions: Captions, checkpoint: Path | None = None
) -> tuple[Any, Any]:
    """Tokenizer and encoder of a run, new ones from one caption of each picture.

    Args:
        config: The run.
        captions: Those of its training pictures.
        checkpoint: What it is resumed from, whose tokenizer is taken.
    """
    texts = captions.captions_of(range(min(len(captions), _MAX_READ)), config.seed, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "text_encoder"))
        tokenizer, encoder = build_text_encoder(config.text_encoder, texts)
    if checkpoint is not None:
        folder = checkpoint / "pipeline" / "tokenizer"
        tokenizer = optional_package(
            "transformers", "a text encoder"
        ).AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None  # the source is not none
    most = config.text_encoder.max_length
    longer = sum(len(ids) > most for ids in tokenizer(texts)["input_ids"])
    if longer:
        logger.info(
            "%d of %d captions have more than %d tokens and are cut: "
            "--text_encoder.max_length is their number", longer, len(texts), most,
        )  # fmt: skip
    return tokenizer, encoder
