"""A config.json that describes more than its weights can fill: refused while it is small."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules import module as registry

from inl_core.run.errors import UserError
from inl_core.run.weights import tensor_shapes, weights_fit


class Tiny(nn.Module):
    """A network whose settings are data."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(config["width"], config["width"]), nn.Identity())
            for _ in range(config["n"])
        )
        self.idle = nn.ModuleList(nn.Identity() for _ in range(config.get("idle", 0)))
        self.register_buffer("table", torch.zeros(config.get("table", 1)), persistent=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"width": 8, "n": 3}
    save_file(Tiny(config).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def describe(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hooks() -> int:
    return sum(
        len(getattr(registry, f"_global_{kind}_registration_hooks"))
        for kind in ("parameter", "buffer", "module")
    )


def test_a_network_that_fits_its_weights_passes_and_leaves_no_hook(folder: Path) -> None:
    weights_fit(folder, Tiny)
    assert hooks() == 0
    assert tensor_shapes(folder)["layers.2.0.weight"] == [8, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 10**8, "width": 1}, "more than 89 tensors"),
        ({"width": 10**6}, "describes a network of"),
        ({"idle": 10**8}, "modules"),
        ({"table": 10**12}, "tables of more than"),
        ({"text_config": {"num_hidden_layers": 10**12}}, "has num_hidden_layers 1000000000000"),
        ({"depths": [2, 10**9]}, "has depths"),
        ({"attention_types": [[["global"], 10**9]]}, "has attention_types"),
        ({"num_labels": 10**9}, "has num_labels"),
        ({"n": "three"}, "cannot build a network from .*config.json: TypeError"),
        ({"attn_implementation": "someone/kernel"}, "names code"),
        ({"text": {"attn_implementation": {"vision": "someone/kernel"}}}, "names code"),
    ],
)
def test_a_config_that_its_weights_cannot_fill_is_refused(
    folder: Path, change: dict, message: str
) -> None:
    describe(folder, **change)
    with pytest.raises(UserError, match=message):
        weights_fit(folder, Tiny)
    assert hooks() == 0


def test_values_that_count_no_layers_may_be_large(folder: Path) -> None:
    describe(folder, hidden_size_per_layer_input=10**6, vocab_size=10**7, rope_theta=10**9)
    weights_fit(folder, Tiny)


def test_packed_weights_may_have_more_numbers_than_bytes(folder: Path) -> None:
    save_file({"packed": torch.zeros(20, dtype=torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="describes a network of"):
        weights_fit(folder, Tiny)
    describe(folder, quantization_config={})
    weights_fit(folder, Tiny)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", 5])
def test_an_index_names_files_beside_it_only(folder: Path, name: object) -> None:
    index = {"weight_map": {"layers.0.0.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a file beside it"):
        weights_fit(folder, Tiny)


def test_a_pipe_or_a_false_header_is_not_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + bytes(40))
    with pytest.raises(UserError, match="its header claims 1099511627776 bytes"):
        tensor_shapes(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe"):
        tensor_shapes(folder)
