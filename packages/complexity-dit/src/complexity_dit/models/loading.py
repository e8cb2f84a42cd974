"""Folders of weights that anybody may have made: no pickle is opened, and weights fit their config.

A config decides how large a network is built, so it is compared with the tensors in the file before
memory is taken: a few bytes of JSON must not ask for a terabyte, and a tensor that is missing must
not be drawn at random.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file
from inl_core.run.json_files import fits, read_json_object

# Metadata of safetensors files that are written already: the header alone is replaced.


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add text to a file's `__metadata__`; the tensors are copied as bytes.

    A file begins with the length of its header, 8 bytes little-endian, and the header, JSON; the
    offsets in it count from its end. Keys are sorted: equal contents give equal bytes.

    Args:
        path: The file.
        metadata: What to add, or to replace.
    """
    with path.open("rb") as old, atomic_file(path) as aside, aside.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        known = header.pop("__metadata__", {}) | metadata
        text = json.dumps({"__metadata__": dict(sorted(known.items()))} | header).encode()
        text += b" " * (-len(text) % 8)  # tensors stay aligned
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new)


PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})

_SHOWN = 3


class SafeModel(ModelMixin):
    """`from_pretrained` of safetensors alone, checked first."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers; what is in a local folder is checked before anything is built.

        Raises:
            UserError: The folder holds pickles in place of safetensors, or weights that its config
                does not describe.
        """
        only_safetensors(kwargs)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_weights(cls, folder, kwargs.get("variant"))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def only_safetensors(kwargs: dict[str, Any]) -> None:
    """Have diffusers read safetensors only; without a word it falls back to pickles."""
    if kwargs.get("use_safetensors") is False:
        raise UserError("use_safetensors=False would open a pickle; only safetensors here")
    kwargs["use_safetensors"] = True


def refuse_pickles(folder: Path) -> None:
    """Say so where a folder has pickles and nothing else to read weights from.

    Raises:
        UserError: Naming one of them.
    """
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{folder / pickles[0]} is a pickle, which can run code and is not opened: save the "
            "weights as safetensors where you trust them"
        )


def check_weights(model: Any, folder: Path, variant: str | None = None) -> None:
    """Compare a folder's config with the names and shapes of its tensors.

    Args:
        model: The class, one of diffusers' `ModelMixin`.
        folder: With `config.json`.
        variant: As in diffusers, e.g. fp16.

    Raises:
        UserError: There are only pickles, a file cannot be read, or config and tensors differ.
    """
    refuse_pickles(folder)
    try:
        config = read_json_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / 'config.json'}: {error}") from error
    theirs = _stored_shapes(folder, variant)
    if theirs is None:
        return  # diffusers says which file it looked for
    if (layers := _layers(config)) > len(theirs):
        raise UserError(
            f"{folder / 'config.json'} asks for {layers} layers or more, and the weights have "
            f"{len(theirs)} tensors: they are not of one model"
        )
    try:
        with torch.device("meta"):
            own = {n: tuple(t.shape) for n, t in model.from_config(config).state_dict().items()}
    except Exception as error:  # of any type: diffusers checks no value of a config
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"no network can be built of {folder / 'config.json'} ({said})") from error
    differences = [
        f"{name} is {theirs[name]} and should be {shape}"
        for name, shape in own.items()
        if name in theirs and theirs[name] != shape
    ]
    differences += [f"{name} is missing" for name in own if name not in theirs]
    differences += [f"{name} is unknown" for name in theirs if name not in own]
    if differences:
        raise UserError(
            f"the weights in {folder} are not those of its config.json "
            f"({len(differences)} tensors differ): {'; '.join(differences[:_SHOWN])}"
        )


def _layers(config: Mapping[str, Any]) -> int:
    """At least so many tensors must a network of this config have."""
    numbers = [0]
    for name, value in config.items():
        if isinstance(value, list):
            numbers.append(len(value))
        if "layers" in name:
            counts = value if isinstance(value, list) else [value]
            numbers.append(sum(count for count in counts if fits(count, int)))
            if any(isinstance(count, int) and not fits(count, int) for count in counts):
                numbers.append(2**63)
    return max(numbers)


def _stored_shapes(folder: Path, variant: str | None) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the tensors that diffusers will read, by name; None if there are no such files."""
    stem = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors") + (
        f".{variant}" if variant else ""
    )
    files = [folder / f"{stem}.safetensors"]
    index = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index{f'.{variant}' if variant else ''}.json"
    if index.is_file():
        try:
            parts: Any = read_json_object(index).get("weight_map")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {index}: {error}") from error
        if not fits(parts, dict[str, str]) or any(Path(p).name != p for p in parts.values()):
            raise UserError(f"{index} names no files beside it: weight_map is {{tensor: file}}")
        files = [folder / name for name in sorted(set(parts.values()))]
    elif not files[0].is_file():
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors' own type, OSError, ValueError, …
            raise UserError(f"cannot read the weights {path}: {error}") from error
    return shapes
