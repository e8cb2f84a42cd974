"""Weights that anyone may have written: safetensors only, and complete for their config."""

import functools
import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from inl_core.run.errors import UserError
from inl_core.run.files import (
    atomic_file,
    finish_merge,
    merged_folder,
    open_regular,
    refuse_strange_files,
)
from inl_core.run.hub import download_weights
from inl_core.run.weights import weights_fit

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_MAX_LISTED = 3


class SafeModel(ModelMixin):
    """A diffusers model that is loaded by `load_weights`.

    Its folder has a module of one line, `shim`, that imports its class, and names it in
    `config.json` for `diffusers.AutoModel` with trust_remote_code.
    """

    shim: ClassVar[str]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers, without `auto_map`, which is for the loader alone."""
        config_dict = {k: v for k, v in config_dict.items() if k != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)  # pyright: ignore

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, with the checks and errors of `load_weights`."""
        return load_weights(
            super().from_pretrained, cls.from_config, pretrained_model_name_or_path, **kwargs
        )

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # pipelines read the signature
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; the files replace those of a folder together, see `merged_folder`."""
        given = inspect.signature(ModelMixin.save_pretrained).bind(self, "", *args, **kwargs)
        if not given.arguments.get("safe_serialization", True):
            warn_of_pickles()
            given.arguments["safe_serialization"] = True
        args, kwargs = given.args[2:], given.kwargs
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with merged_folder(Path(save_directory)) as folder:
            super().save_pretrained(str(folder), *args, **kwargs)
            name, path = type(self).__name__, folder / "config.json"
            saved = json.loads(path.read_text())
            saved.pop("_name_or_path", None)  # where it was loaded from on this machine
            saved["auto_map"] = {"AutoModel": f"{self.shim}.{name}"}
            path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
            shim = f"from complexity_dit import {name}  # noqa: F401\n"
            (folder / f"{self.shim}.py").write_text(shim)


def warn_of_pickles() -> None:
    """Say that ``safe_serialization=False`` writes safetensors all the same."""
    warnings.warn(
        "safe_serialization=False would write a pickle; safetensors are written instead",
        stacklevel=3,
    )


def load_weights(
    load: Callable[..., Any],
    build: Callable[[dict], Any],
    source: Any,
    allow_unused: bool = False,
    optional: tuple[str, ...] = (),
    **kwargs: Any,
) -> Any:
    """Load a network of diffusers or transformers whose every tensor comes from safetensors.

    Args:
        load: `from_pretrained` of the model class.
        build: Builds the network from the contents of `config.json`; it is called on the meta
            device, to compare sizes before memory is allocated.
        source: A folder or Hub id.
        allow_unused: Whether the files may have more tensors than the network, e.g. a head.
        optional: Beginnings of the names of tensors that the files may lack.
        **kwargs: Further arguments of `load`.
    """
    only_safetensors(kwargs)
    if not Path(source).is_dir():
        source = download_weights(str(source), kwargs)  # what is looked at is what is loaded
    folder = Path(source, kwargs.get("subfolder") or "")
    if folder.is_dir():
        finish_merge(folder)
        refuse_strange_files(folder)
        refuse_pickles(folder)
        weights_fit(folder, build)
    with_info = kwargs.pop("output_loading_info", False)
    try:
        network, info = load(source, output_loading_info=True, **kwargs)
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the weights in {folder} do not fit its config.json: {error}") from error
    wrong = [
        f"{name} is missing"
        for name in sorted(info["missing_keys"])
        if not name.startswith(optional)
    ]
    if not allow_unused:
        wrong += [f"{name} is unknown" for name in sorted(info["unexpected_keys"])]
    if wrong:
        raise UserError(
            f"the weights in {folder} are not those of its config.json ({len(wrong)} tensors "
            f"differ): {'; '.join(wrong[:_MAX_LISTED])}"
        )
    return (network, info) if with_info else network


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; safetensors itself would wait for a pipe.

    Raises:
        UserError: It is not a regular file.
        OSError, SafetensorError: It cannot be read.
    """
    open_regular(path, follow_links=True).close()
    return load_file(path)


def describe(error: Exception) -> str:
    """The message of an error, with its class unless it is a UserError."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def only_safetensors(kwargs: dict[str, Any]) -> None:
    """Make diffusers read safetensors only; by default it falls back to pickles silently."""
    if kwargs.get("use_safetensors") is False:
        raise UserError("use_safetensors=False would open a pickle; only safetensors here")
    kwargs["use_safetensors"] = True


def refuse_pickles(folder: Path) -> None:
    """Raise a UserError for a folder with pickles but no safetensors."""
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix.lower() in _PICKLES]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{folder / pickles[0]} is a pickle, which can run code and is not opened: save the "
            "weights as safetensors where you trust them"
        )


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add entries to the `__metadata__` of a safetensors file; tensors are copied as bytes.

    The file starts with the length of its header (8 bytes, little-endian) and the header as JSON;
    tensor offsets count from the end of the header. Keys are sorted, so that equal contents give
    equal bytes.
    """
    with path.open("rb") as old, atomic_file(path) as aside, aside.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        merged = header.pop("__metadata__", {}) | metadata
        text = json.dumps({"__metadata__": dict(sorted(merged.items()))} | header).encode()
        text += b" " * (-len(text) % 8)  # keeps tensors aligned
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new)
