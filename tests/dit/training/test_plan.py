"""The plan of a run against real networks: parameters, FLOPs, bytes that autograd keeps."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from complexity_dit.__main__ import run
from complexity_dit.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    TextEncoderConfig,
    TrainConfig,
)
from complexity_dit.data.latents import FORMAT
from complexity_dit.models.text import build_text_encoder
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.training.plan import (
    activation_bytes,
    count_flops,
    plan,
    state_bytes,
    token_count,
)
from complexity_dit.training.text import PromptedNetwork
from inl_core.run.errors import UserError

SHAPE = {
    "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "sample_size": 16,
    "patch_size": 2, "in_channels": 4, "label_fields": ["style", "genre"], "num_classes": [8, 3],
}  # fmt: skip
BATCH = 3


def network(**changes):
    return ComplexityDiTTransformer2DModel(**SHAPE, **changes)


def saved_bytes(model, precision, cells=16, fields=2, **text):
    """Bytes of all storages that a real forward pass of a batch keeps, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so no address comes back
        return tensor

    x, labels = torch.randn(BATCH, 4, cells, cells), torch.zeros(BATCH, fields).long()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(x, torch.tensor(500.0), labels, return_dict=False, **text)[0]
        torch.nn.functional.mse_loss(out.float(), x)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"dynamics_placement": "none"}, 0.02),
        ({"dynamics_placement": "stream", "dynamics_adaptive": "token"}, 0.02),
        ({"dynamics_placement": "force", "dynamics_adaptive": "channel"}, 0.02),
        ({"num_key_value_heads": 2}, 0.02),
    ],
)
def test_activations_are_those_of_the_network(changes, tolerance):
    model = network(**changes)
    for precision in ("no", "bf16"):
        planned = BATCH * activation_bytes(model.config, precision)
        planned += state_bytes(model.config, precision, OptimConfig())["weights in bf16"]
        # In bf16 the copies of weights that no matrix product reads are not made.
        extra = 0 if precision == "no" else 0.08
        assert planned == pytest.approx(saved_bytes(model, precision), rel=tolerance + extra)


def test_flops_are_those_of_the_matrix_products():
    model = network(dynamics_placement="none")
    forward, both = count_flops(model.config)
    D, N, P = 64, 64, 16
    inner = model.blocks[0].mlp.gate.out_features
    block = N * (4 * D * D + 3 * D * inner) + 2 * N * N * D + 6 * D * D  # with attention and AdaLN
    ends = N * P * D + 256 * D + D * D + 2 * D * D + N * D * P
    assert forward == 2 * (3 * block + ends)
    assert both == pytest.approx(3 * forward - 2 * N * P * D, rel=1e-3)  # images have no gradient


def test_optimizer_bytes_are_those_of_adamw():
    model = network(dynamics_adaptive="token")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    assert state_bytes(model.config, "no", OptimConfig())["optimizer"] == moments
    assert state_bytes(model.config, "no", OptimConfig(name="muon"))["optimizer"] < moments


def test_checkpointing_and_dropped_tokens_need_less():
    config = network(dynamics_adaptive="channel").config
    tokens = token_count(config)
    assert tokens == 64
    full = activation_bytes(config, "no")
    assert activation_bytes(config, "no", checkpointing=True) < full / 2
    half = activation_bytes(config, "no", kept=tokens // 2)
    assert full * 5 / 6 * 0.95 < half < full * 5 / 6 * 1.05  # one block of three at half
    assert count_flops(config, tokens // 2) < count_flops(config)
    assert count_flops(config, tokens) == count_flops(config)


RUN = TrainConfig(
    steps=100, batch_size=32, data=DataConfig(source="latents:nowhere", resolution=256),
    model=ModelConfig(size="tiny", patch_size=2, overrides={"num_layers": 2}),
)  # fmt: skip


def lines(config, options):
    return dict(line.split("  ", 1) for line in plan(config, options).splitlines())


def test_the_table_of_a_run():
    options = PlanConfig(
        channels=4, cells=32, num_classes={"style": 27}, processes=4, train_images=1600,
        peak_tflops=100.0, mfu=0.5,
    )  # fmt: skip
    table = {name: text.strip() for name, text in lines(RUN, options).items()}
    with torch.device("meta"):
        model = ComplexityDiTTransformer2DModel.from_size(
            "tiny", num_layers=2, sample_size=32, patch_size=2, in_channels=4,
            label_fields=["style"], num_classes=[27], dynamics_placement="none",
        )  # fmt: skip
    assert table["tokens an image"] == "256"
    assert table["parameters"] == f"{model.num_parameters():,}"
    assert table["labels"] == "27 of style"
    assert table["steps"] == "100 of 32 images: 3,200 images"
    assert table["epochs"] == "2 of 1,600 images"
    assert "for 8 images at once" in table["activations"]
    assert "state shared by 4" in table["with FSDP"]
    # 4 devices at half of 1e14 FLOP/s, and 3,200 images of so many FLOP.
    speed = 4 * 0.5e14 / count_flops(model.config)[1]
    assert f"at {speed:,.4g} images/s" in table["time, an estimate"]
    assert f"{3200 / speed / 3600:,.3g} h" in table["time, an estimate"]
    measured = lines(RUN, replace(options, images_per_second=1.0))["time, an estimate"]
    assert f"{3200 / 3600:.3g} h at 1 images/s" in measured


READER = TextEncoderConfig(source="lm", max_length=24, overrides={"vocab_size": 300})


@pytest.fixture
def t5(tmp_path):
    """A text encoder of transformers, of which only the config is there."""
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    config = T5Config(num_heads=2, **sizes)
    config.save_pretrained(tmp_path)
    return TextEncoderConfig(source=f"hf:{tmp_path}", max_length=24), T5EncoderModel(config)


def test_a_text_encoder_that_is_trained_along_is_counted():
    """Numbers of the table against real networks that read captions of the greatest length."""
    config = replace(RUN, text_encoder=READER, mixed_precision="no")
    options = PlanConfig(channels=4, cells=32, num_classes={"style": 27})
    table = {name: text.strip() for name, text in lines(config, options).items()}
    assert table["tokens an image"] == "256, and up to 24 of its caption"
    captions = ["a", "b", "river in winter"] * 50
    _, encoder = build_text_encoder(READER, captions)
    # A new tokenizer may find fewer words than it may have.
    whole = type(encoder)(type(encoder.config)(**encoder.config.to_dict() | {"vocab_size": 300}))
    assert table["text encoder"] == f"{whole.num_parameters():,} parameters, trained along"
    reading = ComplexityDiTTransformer2DModel.from_size(
        "tiny", num_layers=2, sample_size=32, patch_size=2, in_channels=4, label_fields=["style"],
        num_classes=[27], dynamics_placement="none", caption_channels=encoder.config.hidden_size,
    )  # fmt: skip
    assert table["parameters"] == f"{reading.num_parameters():,}"
    trained = reading.num_parameters() + whole.num_parameters()
    state = state_bytes(reading.config, "no", OptimConfig(), text=READER)
    assert state["weights"] == state["gradients"] == 4 * trained
    assert state["optimizer"] == 8 * trained

    both = PromptedNetwork(reading, whole)
    words = {
        "input_ids": torch.zeros(BATCH, 24, dtype=torch.long),
        "attention_mask": torch.ones(BATCH, 24, dtype=torch.bool),
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        both(torch.randn(BATCH, 4, 32, 32), torch.tensor(500.0), None, **words)
    assert BATCH * count_flops(reading.config, text=READER)[0] == counter.get_total_flops()
    planned = BATCH * activation_bytes(reading.config, "no", text=READER)
    assert planned == pytest.approx(saved_bytes(both, "no", 32, 1, **words), rel=0.03)
    assert activation_bytes(reading.config, "no") < planned / BATCH


def test_a_frozen_text_encoder_adds_its_weights_and_the_tokens_of_captions(t5):
    text, encoder = t5
    config = replace(RUN, text_encoder=text, mixed_precision="no")
    options = PlanConfig(channels=4, cells=32, num_classes={"style": 27})
    table = {name: value.strip() for name, value in lines(config, options).items()}
    count = encoder.num_parameters()
    assert table["text encoder"] == f"{count:,} parameters, frozen: it reads each caption once"
    model = network(caption_channels=16)
    assert count_flops(model.config, text=text)[0] > count_flops(model.config)[0]
    state = state_bytes(model.config, "no", OptimConfig(), text=text)
    assert state["text encoder"] == 4 * count
    assert state["weights"] == 4 * model.num_parameters()
    with pytest.raises(UserError, match="no folder /no/such"):
        lines(replace(RUN, text_encoder=TextEncoderConfig(source="hf:/no/such")), options)


def test_missing_or_wrong_options_are_refused(tmp_path):
    known = PlanConfig(channels=4, cells=32)
    with pytest.raises(UserError, match=r"no cache nowhere .* --channels and --cells"):
        plan(RUN, PlanConfig())
    with pytest.raises(UserError, match=r"batch_size 32 must be divisible by .* 5 x 1"):
        plan(RUN, replace(known, processes=5))
    with pytest.raises(UserError, match="--mfu and --peak_tflops together"):
        plan(RUN, replace(known, mfu=0.5))
    with pytest.raises(UserError, match=r"images_per_second is 0\.0; expected more than 0"):
        plan(RUN, replace(known, images_per_second=0.0))
    with pytest.raises(UserError, match="patch_size"):
        plan(replace(RUN, model=replace(RUN.model, patch_size=3)), known)
    assert "an estimate" not in lines(RUN, known)
    assert "none counted" in lines(RUN, known)["labels"]


def test_the_shape_of_a_cache_is_read(tmp_path):
    info = {
        "format": FORMAT, "images": 8, "part_size": 8, "resolution": 128, "skipped": 0,
        "shape": [32, 16, 16], "has_std": False, "mirrored": False, "source_fingerprint": "",
        "source": {}, "label_names": {"style": ["a", "b"], "genre": ["c"]},
        "vae": {"name": "v", "class": "V", "sha256": ""},
        "statistics": {"mean": [0.0] * 32, "std": [1.0] * 32, "holdout": 0.1},
    }  # fmt: skip
    (tmp_path / "cache.json").write_text(json.dumps(info))
    data = DataConfig(source=f"latents:{tmp_path}", resolution=128, label_fields=["style"])
    table = lines(replace(RUN, data=data), PlanConfig())
    assert table["tokens an image"].strip() == "64"
    assert table["labels"].strip() == "2 of style"


def test_the_command(capsys):
    run(["plan", "--config", "configs/dit/demo.yaml", "--num_classes", '{"style": 9}'])
    out = capsys.readouterr().out
    assert "tokens an image" in out
    assert "3,300 of 16 images: 52,800 images" in out
    assert "9 of style" in out


def test_the_page_shows_what_the_command_prints(capsys):
    page = (Path(__file__).parents[3] / "docs" / "plan.md").read_text()
    shown = re.findall(r"```sh\n(complexity-dit plan [^`]*)```\n\n```\n([^`]*)```", page)
    assert len(shown) == 3
    for command, output in shown:
        run(shlex.split(command.replace("\\\n", " "))[1:])
        assert capsys.readouterr().out == output


def test_what_auto_is_on_this_machine_is_shown_and_counted(monkeypatch):
    options = PlanConfig(channels=4, cells=32, num_classes={"style": 27})
    for units, precision, words in (
        ({"avx512_bf16": True}, "bf16", "bf16 on this machine: the CPU has avx512_bf16"),
        ({}, "no", "no on this machine: this cpu has no bf16 units"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        table = lines(RUN, options)
        assert table["mixed_precision"].strip() == words
        assert (
            table["activations"]
            == lines(replace(RUN, mixed_precision=precision), options)["activations"]
        )
    assert table["compile"].strip().startswith("no on this machine: it saves about")
    assert (
        not {"mixed_precision", "compile"}
        & lines(replace(RUN, mixed_precision="bf16", compile="regional"), options).keys()
    )
