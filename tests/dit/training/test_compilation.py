"""`compile: max`: the whole network as one graph that CUDA graphs can replay."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.training.train import train
from inl_core import ops
from inl_core.run.errors import UserError
from support.outcomes import losses_of


@pytest.fixture
def counter(monkeypatch):
    """Compiles without inductor and counts the graphs; a graph that is broken or traced again for
    another shape is an error."""
    counted, compiled = CompileCounterWithBackend("aot_eager"), torch.compile

    def by_counter(function, *, mode, **options):
        assert mode == "reduce-overhead"
        assert options == {"fullgraph": True, "dynamic": False}
        return compiled(function, backend=counted, **options)

    monkeypatch.setattr(torch, "compile", by_counter)
    return counted


@pytest.mark.parametrize(
    ("graphs", "model", "settings"),
    [
        (1, {}, {"mixed_precision": "bf16"}),
        # Two: with dropped tokens, and without in the second half.
        (2, {"token_drop_rate": 0.5, "token_drop_until": 0.5}, {}),
    ],
)
def test_a_step_is_one_graph_and_trains_alike(
    graphs, model, settings, small_run, tmp_path, counter
):
    model = dataclasses.replace(small_run.model, **model)
    model.overrides["num_layers"] = 3
    run = dataclasses.replace(small_run, model=model, steps=4, report_to="none", **settings)
    train(run)
    assert counter.frame_count == 0
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=graphs == 1):
        train(dataclasses.replace(run, out=str(tmp_path / "max"), compile="max"))
    assert counter.frame_count == graphs
    close = 1e-2 if run.mixed_precision == "bf16" else 1e-5
    assert losses_of(tmp_path / "max") == pytest.approx(losses_of(run.out), rel=close)


@pytest.mark.slow
def test_inductor_trains_alike(small_run, tmp_path):
    run = dataclasses.replace(small_run, steps=4, report_to="none")
    train(run)
    train(dataclasses.replace(run, out=str(tmp_path / "max"), compile="max"))
    assert losses_of(tmp_path / "max") == pytest.approx(losses_of(run.out), rel=1e-4)


class OnOneDevice(TorchDispatchMode):
    """Notes operations that CUDA graphs cannot hold: on tensors of the CPU, or waited for."""

    def __init__(self):
        super().__init__()
        self.total, self.found = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)]
        self.total += 1
        waits = func is torch.ops.aten._local_scalar_dense.default
        if waits or any(x.device.type != "cuda" for x in tensors):
            self.found.add(str(func))
        return out


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("placement", ["none", "branch", "force"])
def test_no_operation_of_the_network_leaves_the_gpu(placement, backend):
    """With tensors of a GPU that hold no numbers: in the forward pass Python waits for nothing, and
    copies nothing. There is no backward pass without the GPU."""
    with FakeTensorMode(), ops.use_backend(backend):
        with torch.device("cuda"):
            network = ComplexityDiTTransformer2DModel(
                hidden_size=32, num_layers=3, num_attention_heads=2, sample_size=8, in_channels=4,
                label_fields=("style",), num_classes=(3,), dynamics_placement=placement,
                network_output="sample",
            )  # fmt: skip
            x, t = torch.empty(4, 4, 8, 8), torch.empty(4)
            labels = torch.zeros(4, 1, dtype=torch.int64)
            kept = torch.zeros(4, 6, dtype=torch.int64)
        for dropped in (None, kept):
            with OnOneDevice() as seen:
                network(x, t, labels, dropped, return_dict=False)
            assert not seen.found
            assert seen.total > 50


def test_what_does_not_fit_into_one_graph_is_refused(small_run, monkeypatch):
    with pytest.raises(UserError, match=r"gradient_accumulation_steps 2.*use compile regional"):
        dataclasses.replace(small_run, compile="max", gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=r"gradient_checkpointing.*use compile regional"):
        dataclasses.replace(small_run, compile="max", gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"loop_sampling uniform.*compile regional"):
        dataclasses.replace(small_run, compile="max", loop_sampling="uniform")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="compile max needs the whole network in every process"):
        train(dataclasses.replace(small_run, compile="max"))
