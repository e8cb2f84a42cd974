"""Soak test: train, kill -9, resume, finish, sample and evaluate in a loop.

    python -m benchmarks.robustness.soak --minutes 60 --out DIR [--rows benchmarks/results.csv]

The first round is not killed. Every later one is killed one to three times, at a random moment or
while a checkpoint is being written, and resumes with `--resume auto`. It must end with the bits of
the first round: weights, EMA, optimizer state, loss curve, samples, FID and KID. Two processes run
as long as the soak: this one, which forks the trainings and computes nothing (threads would not
survive a fork), and a painter, which loads, samples and evaluates in every round. The memory and
open files of both are recorded per round. `DIR/soak.json` is complete after every round, so an
interrupted soak keeps its rounds; the rows are added at the end.

The exit status is 1 if the bits of a round differ, a process hangs or a training fails.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from benchmarks.common.results import append_rows, as_rows, commit, hardware

from complexity_dit.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
)  # fmt: skip
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.pipelines.sampling import iter_samples, load_pipeline
from complexity_dit.training.train import train
from inl_core.run.checkpoints import find_damage, latest_checkpoint
from inl_core.run.files import atomic_file

STEPS, EVERY = 60, 5
IMAGES = 32
MOST_KILLS = 3


def settings(run):
    """A training of a few seconds on the embedded art set."""
    return TrainConfig(
        out=str(run), resume="auto", steps=STEPS, batch_size=4, log_every=1,
        checkpoint_every=EVERY, keep_last=2, sample_every=20, dynamics_every=20,
        data=DataConfig(resolution=16, num_images=256),
        model=ModelConfig(
            overrides={"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
        ),
        optim=OptimConfig(warmup_steps=4),
    )  # fmt: skip


# Processes ----------------------------------------------------------------------------------------


def redirect_output(log):
    """Append stdout and stderr of this process to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def start_training(run, log):
    """Fork a training and return its process id."""
    child = os.fork()
    if child:
        return child
    # The child must not run the cleanup of the parent or write its buffered output.
    status = 1
    try:
        redirect_output(log)
        torch.set_num_threads(1)
        train(settings(run))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child, seconds):
    """Wait status of a process, or None if it still runs after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    return None


def painter(pipe, log):
    """Answer each run folder with the result of `paint` or a traceback, until None comes."""
    torch.set_num_threads(1)
    redirect_output(log)
    while (run := pipe.recv()) is not None:
        try:
            pipe.send((paint(run), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


def paint(run):
    """SHA-256 of the samples, and FID and KID against held-out images as exact text."""
    folder = run / "pipeline"
    loaded = load_pipeline(str(folder))
    labels = torch.full((IMAGES, len(loaded.label_names)), -1)
    config = SampleConfig(num_inference_steps=6)
    painted = [images for _, images in iter_samples(loaded, labels, config, progress=False)]
    found = evaluate(
        str(folder), "art", run / "evaluation",
        EvalConfig.brief(
            num_images=IMAGES, weights="random", kid_subset_size=16, quiet=True, cache=False
        ),
        config,
    )  # fmt: skip
    return {
        "samples": hashlib.sha256(np.concatenate(painted).tobytes()).hexdigest(),
        "metrics": {
            name: float(value).hex()
            for name, value in sorted(found["metrics"].items())
            if isinstance(value, int | float)
        },
    }


# A round -----------------------------------------------------------------------------------------


class Wrong(Exception):
    """A round with a hang, a failure or damaged files."""


def killed_training(run, log, usual, chance):
    """Kill a run one to three times and return the kills, or that it finished before one."""
    checkpoints, kills = run / "checkpoints", []
    for _ in range(chance.randint(1, MOST_KILLS)):
        child, begun, hangs = start_training(run, log), time.monotonic(), False
        if chance.random() < 0.5:
            moment = "any"
            status = ended(child, chance.uniform(0, usual))
        else:
            moment, status = "while saving", None
            until = time.monotonic() + 10 * usual + 60
            before = latest_checkpoint(checkpoints)
            skip = chance.randint(0, 4)  # not always the first checkpoint of a process
            while status is None and time.monotonic() < until:
                newest = latest_checkpoint(checkpoints)
                if newest != before:
                    before, skip = newest, skip - 1
                if skip <= 0 and any(checkpoints.glob(".step-*-partial")):
                    time.sleep(chance.uniform(0, 0.03))
                    break
                status = ended(child, 0.001)
            else:
                hangs = status is None
        if status is None:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if hangs:
            raise Wrong("a training hangs")
        if os.WIFSIGNALED(status):
            last = latest_checkpoint(checkpoints)
            kills.append(
                {"moment": moment, "after_s": round(time.monotonic() - begun, 2),
                 "reached": last and last.name}
            )  # fmt: skip
        elif status != 0:
            raise Wrong(f"a training failed without a kill: {log.read_text()[-3000:]}")
        else:
            kills.append({"moment": "finished before the kill"})
            break
    return kills


def one_round(run, log, usual, chance, pipe):
    """Train (with kills if `chance` is given), sample and evaluate: the entry of the round."""
    begun = time.monotonic()
    kills = killed_training(run, log, usual, chance) if chance else []
    child = start_training(run, log)
    status = ended(child, 10 * usual + 120)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise Wrong("a training hangs")
    if status != 0:
        raise Wrong(f"a training failed: {log.read_text()[-3000:]}")
    trained = time.monotonic()
    last = latest_checkpoint(run / "checkpoints")
    if wrong := find_damage(last):
        raise Wrong(f"{last.name} is damaged: {wrong}")
    if left := [
        path.name for path in run.rglob(".*") if not path.name.startswith(".complexity-dit-")
    ]:
        raise Wrong(f"partial files are left: {left}")
    files = [*last.rglob("*.safetensors"), *(run / "pipeline").rglob("*.safetensors")]
    files += [run / "train_log.csv", run / "dynamics.csv", *(run / "samples").glob("*.png")]
    bits = {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
    }
    pipe.send(run)
    if not pipe.poll(600):
        raise Wrong("the painter hangs")
    painted, failure = pipe.recv()
    if failure:
        raise Wrong(f"the painter failed: {failure}")
    return {
        "seconds": round(time.monotonic() - begun, 2),
        "training_seconds": round(trained - begun, 2),
        "kills": kills,
        "bits": bits | painted,
    }


def used(process):
    """Resident memory in KiB and open files of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    memory = int(status.partition("VmRSS:")[2].split()[0])
    return {"rss_kib": memory, "open_files": len(os.listdir(f"/proc/{process}/fd"))}


# The soak ---------------------------------------------------------------------------------------


def slope(values):
    """Least-squares slope per round over the last three quarters; the first rounds fill caches."""
    kept = values[len(values) // 4 :]
    if len(kept) < 2:
        return None
    return statistics.linear_regression(range(len(kept)), kept).slope


def summary(rounds):
    """Counts of rounds and kills, and the growth of memory and open files."""
    first = rounds[0]["bits"] if rounds and "bits" in rounds[0] else {}
    kills = [kill for entry in rounds for kill in entry.get("kills", [])]
    found = {
        "rounds": len(rounds),
        "rounds_failed": sum("wrong" in entry for entry in rounds),
        "rounds_with_other_bits": sum(bool(entry.get("differs")) for entry in rounds),
        "compared_a_round": len(first),
        "kills": sum("after_s" in kill for kill in kills),
        "kills_while_saving": sum(kill["moment"] == "while saving" for kill in kills),
    }
    for process, what in itertools.product(("loop", "painter"), ("rss_kib", "open_files")):
        values = [entry[process][what] for entry in rounds if process in entry]
        if values:
            name = f"{process}_{what}"
            found[f"{name}_first"], found[f"{name}_last"] = values[0], values[-1]
            found[f"{name}_slope_a_round"] = slope(values)
    return found


def rows_of(found, minutes):
    """The summary as rows of the result file."""
    units = {"rss_kib": "KiB", "open_files": "files"}
    values = {
        name.replace("_", " "): (value, next((u for part, u in units.items() if part in name), ""))
        for name, value in found.items()
        if value is not None
    }
    case = f"train, kill, resume, sample, evaluate for {minutes:g} min"
    return as_rows(values, case, shape=f"{STEPS} steps, {IMAGES} images")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, required=True, help="no round starts after this; at least two run"
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder of the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty: choose a new folder")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ["XDG_CACHE_HOME"] = str(options.out / "cache")
    chance, began, code = random.Random(options.seed), time.monotonic(), commit()
    fork = multiprocessing.get_context("fork")
    pipe, far_end = fork.Pipe()
    worker = fork.Process(target=painter, args=(far_end, options.out / "painter.log"), daemon=True)
    worker.start()
    rounds, usual = [], 60.0
    result = {
        "training": dataclasses.asdict(settings("RUN")), "seed": options.seed, "commit": code,
        "hardware": hardware("cpu"), "torch": torch.__version__, "minutes": options.minutes,
    }  # fmt: skip
    # At least two rounds, so that there is something to compare on any machine.
    while len(rounds) < 2 or time.monotonic() - began < 60 * options.minutes:
        number = len(rounds)
        run, log = options.out / f"round-{number}", options.out / f"round-{number}.log"
        try:
            entry = one_round(run, log, usual, chance if rounds else None, pipe)
        except Wrong as wrong:
            entry = {"wrong": str(wrong)}
        else:
            entry |= {"loop": used(os.getpid()), "painter": used(worker.pid)}
            if rounds and "bits" in rounds[0]:
                first, own = rounds[0]["bits"], entry.pop("bits")
                entry["differs"] = sorted(
                    name for name in first.keys() | own.keys() if first.get(name) != own.get(name)
                )
            elif not rounds:
                usual = entry["training_seconds"]
        rounds.append(entry)
        found = summary(rounds)
        with atomic_file(options.out / "soak.json") as part:
            content = result | {"summary": found, "rounds": rounds}
            part.write_text(json.dumps(content, indent=1) + "\n")
        print(
            f"round {number}: {entry.get('seconds', 0):.0f} s, {len(entry.get('kills', []))} kills,"
            f" {entry.get('wrong') or entry.get('differs') or 'equal bits'};"
            f" loop {entry.get('loop')}, painter {entry.get('painter')}",
            flush=True,
        )
        if "wrong" in entry and not number:
            break  # nothing to compare with
        if "wrong" not in entry and not entry.get("differs"):
            shutil.rmtree(run)
            log.unlink(missing_ok=True)
        elif not worker.is_alive() or "painter hangs" in entry.get("wrong", ""):
            break
    pipe.send(None)
    worker.join(60)
    if options.rows:
        append_rows(options.rows, "soak", rows_of(found, options.minutes), "cpu", commit=code)
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["rounds_failed"] or found["rounds_with_other_bits"] else 0)


if __name__ == "__main__":
    main()
