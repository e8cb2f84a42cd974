"""Networks that a config.json of anybody describes, compared with the weights beside it.

A few bytes of JSON can describe a network of terabytes, or of so many layers that building it never
ends, even on the meta device. So a network is built once on the meta device, where every parameter
is counted as it is made, and building stops where the weight files cannot fill it.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inl_core.run.errors import UserError
from inl_core.run.files import open_regular
from inl_core.run.json_files import parse_json, read_json_object

if TYPE_CHECKING:
    from torch import Tensor, nn

_COUNTS = re.compile(
    r"(?<!per_)(layers?|blocks?|depths?)$|layers_per_block$|attention_types$|dense_replace$"
)
"""Keys of a config that count layers; its class may make lists of that length."""

_SPARE_LAYERS, _MAX_LABELS = 1_000, 1_000_000
"""A default such as max_window_layers may exceed the layers; the names of labels are a list too."""

_PACKED = 8
"""Most numbers in a byte of weights that are quantized."""

_MAX_HEADER_BYTES = 100_000_000  # of the safetensors format
_BUFFER_NUMBERS = 2**27
"""Numbers that buffers may have beyond the size of the weights, such as tables of positions."""


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in the safetensors files of a folder; only headers are read.

    Raises:
        UserError: A file is not a safetensors file, or an index names files outside the folder.
    """
    for path in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = read_json_object(path)["weight_map"].values()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not an index of weights: {error}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{path} names {name!r}, which is not a file beside it")
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            entries = _header(path)
            entries.pop("__metadata__", None)
            shapes |= {name: list(map(int, entry["shape"])) for name, entry in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    return shapes


def _header(path: Path) -> dict[str, Any]:
    # The files of a model from the Hub are links into its cache.
    with open_regular(path, follow_links=True) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(_MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size - 8):
            raise ValueError(f"its header claims {size} bytes")
        return parse_json(file.read(size))


def weights_fit(folder: Path, build: Callable[[dict[str, Any]], "nn.Module"]) -> None:
    """Refuse a `config.json` that describes more than the weights beside it can fill.

    A folder without safetensors passes: the loader's own error names the files it looks for.

    Args:
        folder: Folder with `config.json` and safetensors files.
        build: Builds the network from the contents of `config.json`. It is called on the meta
            device, where a network takes no memory for its weights.

    Raises:
        UserError: The config has more layers than the files have tensors, or describes a network
            with more parameters; or `build` raises, which is reported as an error in the config.
    """
    shapes = tensor_shapes(folder)
    if not shapes:
        return
    import torch

    path = folder / "config.json"
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        config = read_json_object(path)
        stored *= _PACKED if "quantization_config" in config else 1
        _check_values(path, config, len(shapes))
        with torch.device("meta"), _counted(path, len(shapes), stored):
            network = build(config)
    except UserError:
        raise
    except Exception as error:  # of any type: the values of a config are not checked
        kind = type(error).__name__
        raise UserError(f"cannot build a network from {path}: {kind}: {error}") from error
    _check_numbers(path, sum(p.numel() for p in network.parameters()), stored)


def _check_values(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse numbers of layers for which a config class would make endless lists, and kernels."""
    for key, value in _leaves(config):
        if isinstance(value, int) and (key == "num_labels" or _COUNTS.search(key)):
            if value > (_MAX_LABELS if key == "num_labels" else _SPARE_LAYERS + tensors):
                raise UserError(
                    f"{path} has {key} {value}; the weights next to it are {tensors} tensors"
                )
        # transformers downloads and imports a kernel that is named like a repository.
        elif key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise UserError(f"{path} names code, {key} {value!r}, which is not run: remove the key")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config with its key; that of a list for its elements."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, key if key.endswith("_implementation") else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def _check_numbers(path: Path, numbers: int, stored: int) -> None:
    if numbers > stored:
        raise UserError(
            f"{path} describes a network of {numbers} numbers; the weights next to it have only "
            f"{stored} bytes"
        )


@contextmanager
def _counted(path: Path, tensors: int, stored: int) -> Iterator[None]:
    """Stop the building of a network that outgrows its weights while it is built.

    Generous factors: tied weights are made twice, and files may hold several parameters as one.
    """
    from torch.nn.modules import module as registry

    counts = {"parameters": 0, "numbers": 0, "buffers": 0, "modules": 0}

    def parameter(_module: Any, _name: str, tensor: "Tensor | None") -> None:
        counts["parameters"] += 1
        counts["numbers"] += 0 if tensor is None else tensor.numel()
        if counts["parameters"] > 4 * tensors + 64:
            raise UserError(
                f"{path} describes a network of more than {counts['parameters']} tensors; the "
                f"weights next to it are {tensors}"
            )
        _check_numbers(path, counts["numbers"] // 2, stored)

    def buffer(_module: Any, _name: str, tensor: "Tensor | None") -> None:
        counts["buffers"] += 0 if tensor is None else tensor.numel()
        if counts["buffers"] > max(stored, _BUFFER_NUMBERS):
            raise UserError(
                f"{path} describes tables of more than {counts['buffers']} numbers; the weights "
                f"next to it have only {stored} bytes"
            )

    def child(_module: Any, _name: str, _child: Any) -> None:
        counts["modules"] += 1
        if counts["modules"] > 100 * tensors + 10_000:
            raise UserError(
                f"{path} describes a network of more than {counts['modules']} modules; the weights "
                f"next to it are {tensors} tensors"
            )

    with ExitStack() as stack:
        for handle in (
            registry.register_module_parameter_registration_hook(parameter),
            registry.register_module_buffer_registration_hook(buffer),
            registry.register_module_module_registration_hook(child),
        ):
            stack.callback(handle.remove)
        yield
