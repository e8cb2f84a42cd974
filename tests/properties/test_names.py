"""Label fields come from the columns of somebody's table, and may be called anything."""

import inspect
import keyword

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from complexity_dit.config import ObjectiveConfig
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.image_to_image import (
    ComplexityDiTImg2ImgPipeline,
    ComplexityDiTInpaintPipeline,
    interpolate,
)
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import sample
from complexity_dit.training.objective import build_scheduler
from inl_core.run.errors import UserError
from support.networks import small_network

PIPELINES = (ComplexityDiTPipeline, ComplexityDiTImg2ImgPipeline, ComplexityDiTInpaintPipeline)
ARGUMENTS = {name for cls in PIPELINES for name in inspect.signature(cls.__call__).parameters}
STRANGE = {
    "Art. style", "a.b", ".", "%74ype", "%", "100 %", "Größe", "名前", "a/b", "a\\b", "(a+)+$",
    "weight", "added", "own", "null", "0", "-1", "x:y", "style", "type", "keys", "forward",
}  # fmt: skip
NAMES = sorted(
    {*dir(nn.ModuleDict()), *dir(nn.Module()), *keyword.kwlist, *keyword.softkwlist}
    | ARGUMENTS
    | STRANGE
)
PAINTED = sorted(ARGUMENTS | STRANGE | {"class", "__init__", "training"})


@pytest.fixture(scope="module")
def pipe() -> ComplexityDiTPipeline:
    network = small_network(
        hidden_size=8, num_layers=1, num_attention_heads=1,
        label_fields=NAMES, num_classes=[2] * len(NAMES),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    names = {field: {0: "first", 1: "last"} for field in NAMES}
    made = ComplexityDiTPipeline(network, build_scheduler(ObjectiveConfig()), id2label=names)
    made.set_progress_bar_config(disable=True)
    return made


def paint(pipe, *args, **kwargs):
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
    latents = torch.ones(1, 3, 8, 8)
    return pipe(*args, latents=latents, **(settings | kwargs)).images


def test_every_name_can_be_asked_for(pipe):
    plain = paint(pipe)
    for name in NAMES:
        ids = pipe.get_label_ids({name: "last"})
        assert ids[0, NAMES.index(name)] == 1, name
        assert torch.equal(pipe.get_label_ids(**{name: 1}), ids), name
    for name in PAINTED:
        found = paint(pipe, labels={name: "last"})
        assert not np.array_equal(found, plain), name


def test_a_name_as_a_keyword_is_the_label_or_an_error_that_says_how_to_ask(pipe):
    for name in PAINTED:
        if name in ARGUMENTS - {"self", "named", "labels", "image", "mask_image", "strength"}:
            with pytest.raises(UserError, match=r"labels=\{|give it once|must be"):
                pipe(**{name: "last"})
        else:
            found = paint(pipe, **{name: "last"})
            assert np.array_equal(found, paint(pipe, labels={name: "last"})), name


@pytest.mark.parametrize("name", ["height", "image", "labels", "self", "type", "class", "a.b"])
def test_the_other_pipelines_take_the_same_labels(pipe, name):
    picture, mask = Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255)
    for cls, pictures in (PIPELINES[1], [picture]), (PIPELINES[2], [picture, mask]):
        other = cls.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        found = paint(other, *pictures, labels={name: "last"}, strength=1.0)
        assert np.array_equal(found, paint(pipe, labels={name: "last"}))
    strip = interpolate(pipe, {name: "first"}, {name: "last"}, count=2, num_inference_steps=1)
    assert len(strip) == 2


def test_folders_keep_every_name_and_ordinary_ones_unchanged(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    again = ComplexityDiTPipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    assert list(again.label_names) == NAMES
    for one, other in zip(
        pipe.transformer.state_dict().items(), again.transformer.state_dict().items(), strict=True
    ):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    stored = load_file(tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    for name in ("style", "Größe", "名前", "height", "weight", "added"):
        assert f"label_embed.{name}.weight" in stored
    assert "label_embed.%74ype.weight" in stored
    sample(
        str(tmp_path / "pipeline"), str(tmp_path / "one.png"), 1,
        {"type": ["last"], "height": ["first"], "a.b": ["last"]},
    )  # fmt: skip


def test_an_adapter_adds_labels_to_any_field(pipe):
    network = ComplexityDiTTransformer2DModel.from_config(pipe.transformer.config)
    network.load_state_dict(pipe.transformer.state_dict())
    network.add_labels({name: ["new"] for name in NAMES}, "default")
    assert network.added_labels == {name: ["new"] for name in NAMES}


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\x1b[0m"])
def test_a_name_that_cannot_be_printed_is_refused(name):
    with pytest.raises(ValueError, match="must be a printable name"):
        small_network(label_fields=[name], num_classes=[2])
