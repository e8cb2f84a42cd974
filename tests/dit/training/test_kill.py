"""kill -9 at any moment, then --resume auto: the run ends with the bits of an undisturbed one."""

import pytest

from support.processes import python

# Imports take most of a small run's life, so a parent does them once and forks the runs that are
# killed. It never computes anything itself: threads would not survive a fork.
DRIVER = """
import json, os, random, signal, socket, sys, time, traceback
from pathlib import Path

from safetensors.torch import load_file

from complexity_dit.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from inl_core.run.checkpoints import all_checkpoints, latest_checkpoint
from complexity_dit.training.train import train

# Steps enough that the fastest machine does not reach the end between 25 kills.
KILLS, STEPS, EVERY = 25, 400, 2
place, world = Path(sys.argv[1]), int(sys.argv[2])
chance = random.Random(world)


def start(name, resume):
    config = TrainConfig(
        mixed_precision="no",
        out=str(place / name), resume=resume, steps=STEPS, batch_size=4, log_every=1,
        checkpoint_every=EVERY, keep_last=2, keep_every=40,
        data=DataConfig(resolution=16, num_images=32),
        model=ModelConfig(
            overrides={"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
        ),
        optim=OptimConfig(warmup_steps=4),
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if world > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            }
        log = os.open(place / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            train(config)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return children


def finish(name, resume):
    statuses = [os.waitpid(child, 0)[1] for child in start(name, resume)]
    assert statuses == [0] * world, (place / f"{name}.log").read_text()[-4000:]


def wait_for(children, condition):
    while not condition():
        assert os.waitpid(children[0], os.WNOHANG) == (0, 0), (
            "the run ended before it was killed: "
            + (place / "killed.log").read_text()[-4000:]
        )
        time.sleep(0.0005)


def kill(children):
    for child in chance.sample(children, world):
        os.kill(child, signal.SIGKILL)
        time.sleep(chance.uniform(0, 0.01))
    for child in children:
        status = os.waitpid(child, 0)[1]
        # A process whose partner died may fail by itself before it is killed.
        assert os.WIFSIGNALED(status) or world > 1


def check(run):
    for checkpoint in all_checkpoints(run / "checkpoints"):
        json.loads((checkpoint / "state.json").read_text())
        json.loads((checkpoint / "pipeline" / "model_index.json").read_text())
        files = sorted(checkpoint.rglob("*.safetensors"))
        assert len(files) == 3, files
        for file in files:
            load_file(file)
    log = run / "train_log.csv"
    if log.exists():
        steps = [line.partition(",")[0] for line in log.read_text().splitlines()[1:-1]]
        assert steps == [str(i + 1) for i in range(len(steps))], steps


def outcome(run):
    last = latest_checkpoint(run / "checkpoints")
    files = [*sorted(last.rglob("*.safetensors")), *sorted((run / "pipeline").rglob("*.safe*"))]
    tensors = {str(path.relative_to(run)): path.read_bytes() for path in files}
    state = json.loads((last / "state.json").read_text())
    del state["config"]
    return tensors | {"state": state, "curve": (run / "train_log.csv").read_bytes()}


straight, killed = place / "straight", place / "killed"
began = time.perf_counter()
finish("straight", "none")
moments = ["early", "step", "writing", "writing", "saved"] * (KILLS // 5)
chance.shuffle(moments)
reached = []
for moment in moments:
    before = latest_checkpoint(killed / "checkpoints")
    children = start("killed", "auto")
    checkpoints = killed / "checkpoints"
    if moment == "early":
        time.sleep(chance.uniform(0, 1.0))
    else:
        wait_for(children, lambda: latest_checkpoint(checkpoints) != before)
        if moment == "step":
            time.sleep(chance.uniform(0, 0.1))
        elif moment == "writing":
            wait_for(children, lambda: any(checkpoints.glob(".step-*-partial")))
            time.sleep(chance.uniform(0, 0.03))
        else:  # between the rename of the new one and the removal of an old one, or near it
            newest = latest_checkpoint(checkpoints)
            wait_for(children, lambda: latest_checkpoint(checkpoints) != newest)
            time.sleep(chance.uniform(0, 0.003))
    kill(children)
    check(killed)
    last = latest_checkpoint(checkpoints)
    reached.append(last and int(last.name[5:]))
finish("killed", "auto")
result, expected = outcome(killed), outcome(straight)
assert result.keys() == expected.keys()
assert [name for name in result if result[name] != expected[name]] == []
assert len(result["curve"].splitlines()) == STEPS + 1
names = [path.name for path in all_checkpoints(killed / "checkpoints")]
assert names == [path.name for path in all_checkpoints(straight / "checkpoints")], names
hidden = {path.name for path in killed.rglob(".*")}
assert hidden == {path.name for path in straight.rglob(".*")}, hidden
print(f"{len(reached)} kills at {reached}, {time.perf_counter() - began:.0f} s")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_25_kills_change_nothing(tmp_path, processes):
    print(python("-c", DRIVER, tmp_path, processes).stdout)
