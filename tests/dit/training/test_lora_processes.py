"""An adapter trained by two processes equals the one trained by a single process."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from support.outcomes import last_checkpoint
from support.processes import python, torchrun

WORKER = """
import sys
import torch
from complexity_dit.config import (
    DataConfig, LoraOptions, ObjectiveConfig, OptimConfig, TrainConfig
)
from complexity_dit.training.train import train

out, base, pictures = sys.argv[1:]
torch.set_default_dtype(torch.float64)
train(
    TrainConfig(
        mixed_precision="no",
        out=out, init_from=base, resume="auto", steps=12, batch_size=4, checkpoint_every=6,
        # Each picture has a style of its own or none: a process may meet no new name in its share.
        data=DataConfig(source="imagefolder:" + pictures, resolution=8, holdout=0.0),
        objective=ObjectiveConfig(network_output="target"),
        optim=OptimConfig(lr=0.01, warmup_steps=1),
        lora=LoraOptions(rank=2),
    )
)
"""


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Six pictures: two of a new style, two of one that the base has, two without one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(0)
    rows = ["file_name,style"]
    for i, style in enumerate(("Hokusai", "Hokusai", "Cubism", "Cubism", "", "")):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{style}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_the_adapter_of_one(pipe, pictures, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "worker.py").write_text(WORKER)
    tensors = {}
    for count in (1, 2):
        out = tmp_path / f"by-{count}"
        arguments = (tmp_path / "worker.py", out, tmp_path / "base", pictures)
        _ = python(*arguments) if count == 1 else torchrun(2, *arguments)
        last = last_checkpoint(out)
        assert json.loads((last / "state.json").read_text())["processes"] == count
        adapter = load_file(out / "adapter" / "pytorch_lora_weights.safetensors")
        tensors[count] = load_file(last / "model.safetensors")
        tensors[count] |= {f"adapter/{name}": value for name, value in adapter.items()}
    assert tensors[1].keys() == tensors[2].keys()
    moved = 0
    for name, value in tensors[1].items():
        distance = (value - tensors[2][name]).abs().max()
        assert distance <= 1e-7 * (1e-6 + value.abs().max()), name
        moved += value.abs().max() > 0
    assert moved == len(tensors[1])  # every matrix and the new row, none left at zero
