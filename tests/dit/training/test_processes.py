"""Several processes train as one does, each with all of the weights (DDP) or a shard (FSDP2)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.outcomes import last_checkpoint, rows_of
from support.processes import python, torchrun

WORKER = """
import logging, sys
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import complexity_dit.training.train as training
from complexity_dit.config import ModelConfig, OptimConfig, TextEncoderConfig, TrainConfig
from complexity_dit.data.dataset import DataConfig

logging.basicConfig(level=logging.INFO)
out, kind, steps, resume, captions = sys.argv[1:]
torch.set_default_dtype(torch.float64)
text = TextEncoderConfig()
if captions:
    from transformers import PreTrainedModel

    PreTrainedModel.float = PreTrainedModel.double  # an encoder is otherwise trained in fp32
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text = TextEncoderConfig(source="lm", max_length=40, overrides=sizes | {"vocab_size": 300})


def shard(self, model, optimizer):
    # What accelerate's FSDP2 does on GPUs; on a CPU it refuses.
    names = {p: name for name, p in model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh("cpu", (self.num_processes,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, groups):
        group["params"] = [sharded[name] for name in members]
    return model, optimizer


def checked(accelerator, model, state, *rest):
    result = step(accelerator, model, state, *rest)
    moments = [m for s in state.optimizer.state.values() for m in s.values() if m.numel() > 1]
    assert len(moments) > 20
    for tensor in (*state.model.parameters(), *state.ema.shadow_params, *moments):
        assert isinstance(tensor, DTensor)
        assert tensor.to_local().numel() < tensor.numel() or tensor.shape[0] < 2
    return result


if kind == "fsdp":
    Accelerator.prepare = shard
    step, training.optimizer_step = training.optimizer_step, checked
training.train(
    TrainConfig(
        mixed_precision="no",
        out=out, resume=resume, steps=int(steps), batch_size=4, log_every=4, checkpoint_every=10,
        keep_last=0, sample_every=10, dynamics_every=10,
        data=DataConfig(resolution=8, num_images=32, caption_template=captions or None),
        text_encoder=text,
        # Numbers of repetitions are drawn alike; blocks in the loop are gathered for each of them.
        loop_sampling="uniform",
        gradient_checkpointing=kind != "one",
        model=ModelConfig(
            dynamics_placement="branch", num_loops=2,
            overrides={"hidden_size": 32, "num_layers": 3, "num_attention_heads": 2},
        ),
        # A constant rate: a run of 10 steps is the first half of a run of 20.
        optim=OptimConfig(warmup_steps=2, schedule="constant_with_warmup"),
    )
)
"""


@pytest.fixture
def launch(tmp_path):
    """Train in fp64 in a folder of `tmp_path`; returns that folder and what was logged."""
    (tmp_path / "worker.py").write_text(WORKER)

    def run(out, kind, steps=20, resume="auto", captions=""):
        arguments = [tmp_path / "worker.py", tmp_path / out, kind, steps, resume, captions]
        done = python(*arguments) if kind == "one" else torchrun(2, *arguments)
        meta = json.loads((last_checkpoint(tmp_path / out) / "state.json").read_text())
        assert (meta["step"], meta["processes"]) == (steps, 1 if kind == "one" else 2)
        return tmp_path / out, done.stderr

    return run


def curve(run: Path) -> dict[str, list[float]]:
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [str(i + 1) for i in range(20)]
    return {name: [float(row[name]) for row in rows] for name in ("loss", "grad_norm")}


def assert_equal_runs(run: Path, other: Path, count: int = 3) -> None:
    for name, values in curve(run).items():
        assert values == pytest.approx(curve(other)[name], rel=1e-9, abs=0), name
    a, b = last_checkpoint(run), last_checkpoint(other)
    files = [str(p.relative_to(a)) for p in a.rglob("*.safetensors")]
    assert len(files) == count
    for file in files:
        result, expected = load_file(a / file), load_file(b / file)
        assert result.keys() == expected.keys()
        for key, value in result.items():
            assert value.dtype == expected[key].dtype
            distance = (value - expected[key]).abs().max() / (1e-6 + expected[key].abs().max())
            assert distance < 1e-7, (file, key)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_match_one(launch, tmp_path):
    """DDP, and checkpoints that any number of processes can resume from."""
    one, _ = launch("one", "one")
    two, _ = launch("two", "ddp")
    assert_equal_runs(two, one)
    _, log = launch("on", "ddp", resume=one / "checkpoints" / "step-00000010")
    assert "written by 1 process(es) and is resumed by 2" in log


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_match_one_with_captions(launch):
    """A text encoder that is trained along, on captions that are drawn and left out at random."""
    captions = "{style} in {genre}"
    one, _ = launch("one", "one", captions=captions)
    two, _ = launch("two", "ddp", captions=captions)
    assert_equal_runs(two, one, 4)
    plain, _ = launch("plain", "one")
    assert curve(plain) != curve(one)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shards_match_one_process(launch, tmp_path):
    """FSDP2 on a gloo mesh: training, callbacks, saving and loading in both directions."""
    one, _ = launch("one", "one")
    sharded, _ = launch("sharded", "fsdp")
    assert_equal_runs(sharded, one)
    assert {p.name for p in (sharded / "samples").iterdir()} == {
        p.name for p in (one / "samples").iterdir()
    }
    launch("there", "one", steps=10)
    there, log = launch("there", "fsdp")
    assert "written by 1 process(es) and is resumed by 2" in log
    assert_equal_runs(there, one)
    launch("back", "fsdp", steps=10)
    back, log = launch("back", "one")
    assert "written by 2 process(es) and is resumed by 1" in log
    assert_equal_runs(back, one)


EVALUATED = """
import sys
from functools import partial

from complexity_dit import __main__ as cli
from complexity_dit.config import EvalConfig

EvalConfig.brief = partial(EvalConfig.brief, weights="random")
cli.main()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_evaluate_together_and_stop_after_the_same_step(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    run = tmp_path / "run"
    command = [
        sys.executable, "-c", EVALUATED, "train", "--out", str(run), "--steps=100000",
        "--batch_size=4", "--log_every=1", "--evaluate_every=5", "--evaluate_num_images=6",
        "--data.num_images=64", "--data.resolution=8", "--optim.warmup_steps=1",
        "--model.overrides={hidden_size: 32, num_layers: 1, num_attention_heads: 2}",
    ]  # fmt: skip
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
    }  # fmt: skip
    both = []
    try:
        for rank in ("0", "1"):
            with (tmp_path / f"{rank}.txt").open("w") as log:
                of_rank = environment | {"RANK": rank, "LOCAL_RANK": rank}
                both.append(subprocess.Popen(command, env=of_rank, stdout=log, stderr=log))
        metrics = run / "metrics.csv"
        while not metrics.exists() or "fd_random" not in metrics.read_text():
            assert [worker.poll() for worker in both] == [None, None]
            time.sleep(0.05)
        both[1].send_signal(signal.SIGTERM)
        statuses = [worker.wait(timeout=200) for worker in both]
    finally:
        for worker in both:
            worker.kill()
            worker.wait()
    logs = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert statuses == [143, 143], logs
    last = int(last_checkpoint(run).name[5:])
    for text in logs:
        assert f"stopped by SIGTERM after step {last} of 100000" in text
        assert "Traceback" not in text
    assert rows_of(run)[-1]["step"] == str(last)
