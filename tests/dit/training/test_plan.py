"""The plan of a run: its formulas against the network, torch's counter and autograd's own bytes."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from complexity_dit.__main__ import run
from complexity_dit.config import DataConfig, ModelConfig, PlanConfig, TrainConfig
from complexity_dit.models.transformer import (
    ADAPTIVES,
    PLACEMENTS,
    SIZES,
    ComplexityDiTTransformer2DModel,
)
from complexity_dit.training.plan import (
    activation_bytes,
    count_parameters,
    forward_flops,
    plan,
    state_bytes,
    token_count,
    training_flops,
)
from inl_core.run.errors import UserError

# Two sizes, with keys as wide as queries and narrower, square counts of tokens that differ.
SHAPES = [
    {"hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "sample_size": 16},
    {"hidden_size": 96, "num_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
     "sample_size": 12, "mlp_ratio": 4.0, "dynamics_controller_hidden": 32},
]  # fmt: skip
KINDS = [("none", "token"), *((p, a) for p in PLACEMENTS if p != "none" for a in ADAPTIVES)]
BATCH = 2


def network(shape, placement, adaptive):
    torch.manual_seed(0)
    return ComplexityDiTTransformer2DModel(
        **shape, patch_size=2, in_channels=4, label_fields=["style", "genre"], num_classes=[8, 3],
        dynamics_placement=placement, dynamics_adaptive=adaptive,
    )  # fmt: skip


def inputs(model):
    side = model.config.sample_size
    return torch.randn(BATCH, 4, side, side), torch.tensor(500.0), torch.zeros(BATCH, 2).long()


def saved_bytes(model, precision):
    """Bytes of all storages that autograd keeps for the backward, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so no address comes back
        return tensor

    x, t, labels = inputs(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(x, t, labels, return_dict=False)[0]
        torch.nn.functional.mse_loss(out.float(), x)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("placement", "adaptive"), KINDS)
def test_parameters_flops_and_activations_are_the_network_s(shape, placement, adaptive):
    model = network(shape, placement, adaptive)
    config = model.config
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())

    # The counter does not know the fused attention of a CPU: let it see the products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(*inputs(model), return_dict=False)[0].sum()
        forward = counter.get_total_flops()
        loss.backward()
    assert BATCH * forward_flops(config) == forward
    assert BATCH * training_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.01)

    for precision, tolerance in (("no", 0.02), ("bf16", 0.1)):
        formula = BATCH * activation_bytes(config, precision)
        formula += state_bytes(config, precision, "adamw")["weights in bf16"]
        assert formula == pytest.approx(saved_bytes(model, precision), rel=tolerance)


@pytest.mark.parametrize(
    "extra",
    [{"value_residual": True}, {"routing": "timestep", "num_experts": 3}, {"routing": "position"}],
)
def test_what_the_recipe_adds_is_counted(extra):
    shape = {**SHAPES[0], **extra, "patch_size": 2, "in_channels": 4}
    model = ComplexityDiTTransformer2DModel(
        **shape, label_fields=["style", "genre"], num_classes=[8, 3]
    )
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    formula = BATCH * activation_bytes(model.config, "no")
    assert formula == pytest.approx(saved_bytes(model, "no"), rel=0.1)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_every_named_size(size):
    with torch.device("meta"):
        model = ComplexityDiTTransformer2DModel.from_size(
            size, in_channels=4, label_fields=["style"], num_classes=[27]
        )
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_optimizer_bytes_are_those_of_adamw():
    model = network(SHAPES[0], "branch", "token")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    assert state_bytes(model.config, "no", "adamw")["optimizer"] == moments
    assert state_bytes(model.config, "no", "muon")["optimizer"] < moments


def test_checkpointing_and_dropped_tokens_cost_less():
    config = network(SHAPES[0], "branch", "channel").config
    tokens = token_count(config)
    assert tokens == 64
    whole = activation_bytes(config, "no")
    assert activation_bytes(config, "no", checkpointing=True) < whole / 2
    half = activation_bytes(config, "no", kept=tokens // 2)
    assert whole * 5 / 6 * 0.95 < half < whole * 5 / 6 * 1.05  # one block of three at half
    assert forward_flops(config, tokens // 2) < forward_flops(config)
    assert forward_flops(config, tokens) == forward_flops(config)


RUN = TrainConfig(
    steps=100, batch_size=32, data=DataConfig(source="latents:nowhere", resolution=256),
    model=ModelConfig(size="B", patch_size=2),
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
            "B", sample_size=32, patch_size=2, in_channels=4, label_fields=["style"],
            num_classes=[27], dynamics_adaptive="channel",
        )  # fmt: skip
    assert table["tokens an image"] == "256"
    assert table["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert table["labels"] == "27 of style"
    assert table["steps"] == "100 of 32 images: 3,200 images"
    assert table["epochs"] == "2 of 1,600 images"
    assert "for 8 images at once" in table["activations"]
    assert "state shared by 4" in table["with FSDP"]
    # 4 devices at half of 1e14 FLOP/s, and 3,200 images of so many FLOP.
    speed = 4 * 0.5e14 / training_flops(model.config)
    assert f"at {speed:,.4g} images/s" in table["time, an estimate"]
    assert f"{3200 / speed / 3600:,.3g} h" in table["time, an estimate"]
    measured = lines(RUN, replace(options, images_per_second=1.0))["time, an estimate"]
    assert f"{3200 / 3600:.3g} h at 1 images/s" in measured


def test_what_is_missing_or_does_not_fit_is_said(tmp_path):
    known = PlanConfig(channels=4, cells=32)
    with pytest.raises(UserError, match=r"no cache nowhere .* --channels and --cells"):
        plan(RUN, PlanConfig())
    with pytest.raises(UserError, match=r"batch_size 32 must be divisible by .* 5 x 1"):
        plan(RUN, replace(known, processes=5))
    with pytest.raises(UserError, match="--mfu and --peak_tflops together"):
        plan(RUN, replace(known, mfu=0.5))
    with pytest.raises(UserError, match="a speed above 0, got 0 images/s"):
        plan(RUN, replace(known, images_per_second=0.0))
    with pytest.raises(UserError, match="patch_size"):
        plan(replace(RUN, model=replace(RUN.model, patch_size=3)), known)
    assert "an estimate" not in lines(RUN, known)
    assert "none counted" in lines(RUN, known)["labels"]


def test_the_shape_of_a_cache_is_read(tmp_path):
    info = {"shape": [32, 16, 16], "label_names": {"style": ["a", "b"], "genre": ["c"]}}
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
