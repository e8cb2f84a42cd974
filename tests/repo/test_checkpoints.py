"""The trained pipelines in `checkpoints/`: of this repository, small, and ready to paint."""

import re
from pathlib import Path

import pytest
import torch
from benchmarks.recipe.paintings_checkpoint import MAX_BYTES
from torch import nn

from complexity_dit.config import SHIPPED
from complexity_dit.pipelines.model_card import guidance_text
from complexity_dit.pipelines.sampling import load_pipeline

FOLDER = Path(__file__).parents[2] / "checkpoints"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_pipeline_is_small_names_no_machine_and_paints(name):
    files = [path for path in (FOLDER / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    for path in files:
        if path.suffix in (".json", ".md", ".py"):
            found = re.search(r"(^|[\s\"':])/(home|root|tmp|work|Users)/", path.read_text())
            assert not found, f"{path}: {found}"

    pipe = load_pipeline(str(FOLDER / name))
    pipe.set_progress_bar_config(disable=True)
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
    first = {field: next(iter(names)) for field, names in pipe.label_names.items()}
    asked = {"prompt": "a river"} if pipe.reads_text else {"labels": first}
    image = pipe(**asked, num_inference_steps=1).images[0]
    assert image.size == (128, 128)
    card = (FOLDER / name / "README.md").read_text()
    assert f"complexity-dit sample {name} " in card
    assert f"| recommended guidance | {guidance_text(pipe.guidance)} |" in card
