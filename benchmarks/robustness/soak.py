"""Soak test of both packages: train, kill, resume and finish in a loop; sample and evaluate.

    python -m benchmarks.robustness.soak --minutes 60 --out DIR [--rows benchmarks/results.csv]

Rounds of complexity-dit and complexity-lm take turns. The first one of each is not killed. Every
later one is stopped one to three times by SIGKILL, SIGTERM or SIGINT, at a random moment or while a
checkpoint is being written, and resumes with `--resume auto`. It must end with the bits of the
first: weights and train_log.csv, and with complexity-dit EMA, samples, FID and KID. A training that
SIGTERM or SIGINT stops in a step must exit with 143 or 130 and leave the checkpoint that it names.

Two processes run as long as the soak: this one, which forks the trainings and computes nothing
(threads would not survive a fork), and a painter, which loads, samples and evaluates. The memory
and open files of both are recorded per round. `DIR/soak.json` is complete after every round, so an
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
import re
import shutil
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import yaml
from benchmarks.common.results import append_rows, as_rows, commit, hardware

import complexity_dit.config as dit
import complexity_dit.training.train  # noqa: F401 — or each fork would spend seconds on it
import complexity_lm.config as lm
import complexity_lm.train  # noqa: F401
from complexity_dit.__main__ import main as dit_main
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.pipelines.sampling import iter_samples, load_pipeline
from complexity_lm.__main__ import main as lm_main
from complexity_lm.loading import load
from inl_core.run.checkpoints import find_damage, folder_of_step, latest_checkpoint
from inl_core.run.files import atomic_file

STEPS, EVERY = 60, 5
IMAGES = 32
MOST_KILLS = 3
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

COMMON = {
    "resume": "auto", "steps": STEPS, "batch_size": 4, "log_every": 1, "checkpoint_every": EVERY,
    "keep_last": 2, "dynamics_every": 20,
}  # fmt: skip

PACKAGES = {
    "complexity-dit": (
        dit_main,
        dit.TrainConfig(
            **COMMON, sample_every=20,
            data=dit.DataConfig(resolution=16, num_images=256),
            model=dit.ModelConfig(
                dynamics_placement="branch",
                overrides={"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
            ),
            optim=dit.OptimConfig(warmup_steps=4),
        ),
    ),
    "complexity-lm": (
        lm_main,
        lm.TrainConfig(
            **COMMON, eval_every=20, eval_blocks=4,
            data=lm.DataConfig(
                source=f"text:{Path(json.__file__).parent}", files="*.py", context=32,
                piece_bytes=1024,
            ),
            tokenizer=lm.TokenizerConfig(vocab_size=300),
            model=lm.ModelConfig(
                overrides={
                    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "num_key_value_heads": 1,
                }
            ),
            optim=lm.OptimConfig(warmup_steps=4),
        ),
    ),
}  # fmt: skip
"""Command lines and settings of trainings of a few seconds: the embedded art set, and the source
code of the package json."""


# Processes ----------------------------------------------------------------------------------------


def redirect_output(log):
    """Append stdout and stderr of this process to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def start_training(package, run, log):
    """Fork `train --config FILE` of a package and return its process id."""
    main, settings = PACKAGES[package]
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(dataclasses.asdict(settings) | {"out": str(run)}))
    child = os.fork()
    if child:
        return child
    # The child must not run the cleanup of the parent or write its buffered output.
    status = 1
    try:
        redirect_output(log)
        torch.set_num_threads(1)
        sys.argv = [package, "train", "--config", str(config)]
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except KeyboardInterrupt:  # before or after the command
        status = 130
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
    """Answer each package and run folder with its painting or a traceback, until None comes."""
    torch.set_num_threads(1)
    redirect_output(log)
    works = {"complexity-dit": paint, "complexity-lm": write}
    while (work := pipe.recv()) is not None:
        package, run = work
        try:
            pipe.send((works[package](run), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


def paint(run):
    """SHA-256 of the samples, and FID and KID against held-out images as exact text."""
    folder = run / "pipeline"
    loaded = load_pipeline(str(folder))
    labels = torch.full((IMAGES, len(loaded.label_names)), -1)
    config = dit.SampleConfig(num_inference_steps=6)
    painted = [images for _, images in iter_samples(loaded, labels, config, progress=False)]
    found = evaluate(
        str(folder), "art", run / "evaluation",
        dit.EvalConfig.brief(
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


def write(run):
    """SHA-256 of the text that the model continues."""
    loaded = load(str(run / "model"))
    tokens = loaded.tokenizer("def ", return_tensors="pt")
    text = loaded.model.generate(**tokens, max_new_tokens=16, do_sample=False)
    return {"text": hashlib.sha256(text.numpy().tobytes()).hexdigest()}


# A round -----------------------------------------------------------------------------------------


class Wrong(Exception):
    """A round with a hang, a failure or damaged files."""


def stopped(run, status, number, said):
    """Whether a training ended by a signal; a save that its output names must be complete.

    Outside its steps SIGTERM kills a training, and SIGINT interrupts it.
    """
    code = os.waitstatus_to_exitcode(status)
    if saved := re.search(rf"stopped by {number.name} after step (\d+) of", said):
        checkpoint = folder_of_step(run / "checkpoints", int(saved[1]))
        if not checkpoint.is_dir() or find_damage(checkpoint):
            raise Wrong(f"{number.name} left {checkpoint} missing or damaged")
        return code == 128 + number
    return code == (130 if number == signal.SIGINT else -number)


def killed_training(package, run, log, usual, chance):
    """Stop a run one to three times and return the kills, or that it finished before one."""
    checkpoints, kills = run / "checkpoints", []
    for _ in range(chance.randint(1, MOST_KILLS)):
        number, earlier = chance.choice(SIGNALS), log.stat().st_size if log.exists() else 0
        child, begun, hangs = start_training(package, run, log), time.monotonic(), False
        if chance.random() < 0.5:
            moment = "any"
            status = ended(child, chance.uniform(0.1, usual))
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
        if status is None and not hangs:
            os.kill(child, number)
            after = round(time.monotonic() - begun, 2)
            status = ended(child, 10 * usual + 60)
        else:
            number = None
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Wrong("a training hangs")
        said = log.read_bytes()[earlier:].decode(errors="replace")
        if number and status != 0:
            if not stopped(run, status, number, said):
                raise Wrong(f"{number.name} ended a training with {status}: {said[-3000:]}")
            last = latest_checkpoint(checkpoints)
            kills.append(
                {"signal": number.name, "moment": moment, "after_s": after,
                 "saved": "stopped by" in said, "reached": last and last.name}
            )  # fmt: skip
        elif status != 0:
            raise Wrong(f"a training failed without a kill: {said[-3000:]}")
        else:
            kills.append({"moment": "finished before the kill"})
            break
    return kills


def one_round(package, run, log, usual, chance, pipe):
    """Train (with kills if `chance` is given), sample and evaluate: the entry of the round."""
    begun = time.monotonic()
    kills = killed_training(package, run, log, usual, chance) if chance else []
    child = start_training(package, run, log)
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
    if left := [path.name for path in run.rglob(".*") if not path.name.startswith(".complexity-")]:
        raise Wrong(f"partial files are left: {left}")
    patterns = ("pipeline/**/*.safetensors", "model/*.safetensors", "*.csv", "samples/*.png")
    files = [*last.rglob("*.safetensors"), *(path for each in patterns for path in run.glob(each))]
    bits = {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
    }
    pipe.send((package, run))
    if not pipe.poll(600):
        raise Wrong("the painter hangs")
    painted, failure = pipe.recv()
    if failure:
        raise Wrong(f"the painter failed: {failure}")
    return {
        "package": package,
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
    kills = [kill for entry in rounds for kill in entry.get("kills", [])]
    found = {
        "rounds": len(rounds),
        "rounds_failed": sum("wrong" in entry for entry in rounds),
        "rounds_with_other_bits": sum(bool(entry.get("differs")) for entry in rounds),
        "compared_a_round": sum(len(entry.get("bits", ())) for entry in rounds[: len(PACKAGES)]),
        "kills": sum("after_s" in kill for kill in kills),
        "kills_while_saving": sum(kill["moment"] == "while saving" for kill in kills),
        "stops_that_saved": sum(kill.get("saved", False) for kill in kills),
    }
    for number in SIGNALS:
        found[f"kills_by_{number.name}"] = sum(kill.get("signal") == number.name for kill in kills)
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
        "--minutes", type=float, required=True, help="no round starts after this; at least four run"
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
    rounds, usual, names = [], dict.fromkeys(PACKAGES, 60.0), list(PACKAGES)
    result = {
        "training": {name: dataclasses.asdict(PACKAGES[name][1]) for name in names},
        "seed": options.seed, "commit": code,
        "hardware": hardware("cpu"), "torch": torch.__version__, "minutes": options.minutes,
    }  # fmt: skip
    # At least two rounds of each, so that there is something to compare on any machine.
    while len(rounds) < 2 * len(names) or time.monotonic() - began < 60 * options.minutes:
        number, package = len(rounds), names[len(rounds) % len(names)]
        first = rounds[number % len(names)] if number >= len(names) else None
        run, log = options.out / f"round-{number}", options.out / f"round-{number}.log"
        try:
            entry = one_round(package, run, log, usual[package], first and chance, pipe)
        except Wrong as wrong:
            entry = {"package": package, "wrong": str(wrong)}
        else:
            entry |= {"loop": used(os.getpid()), "painter": used(worker.pid)}
            if first:
                theirs, own = first["bits"], entry.pop("bits")
                entry["differs"] = sorted(
                    name for name in theirs | own if theirs.get(name) != own.get(name)
                )
            else:
                usual[package] = entry["training_seconds"]
        rounds.append(entry)
        found = summary(rounds)
        with atomic_file(options.out / "soak.json") as part:
            content = result | {"summary": found, "rounds": rounds}
            part.write_text(json.dumps(content, indent=1) + "\n")
        print(
            f"round {number}, {package}: {entry.get('seconds', 0):.0f} s,"
            f" {len(entry.get('kills', []))} kills,"
            f" {entry.get('wrong') or entry.get('differs') or 'equal bits'};"
            f" loop {entry.get('loop')}, painter {entry.get('painter')}",
            flush=True,
        )
        if "wrong" in entry and not first:
            break  # nothing to compare with
        if "wrong" not in entry and not entry.get("differs"):
            shutil.rmtree(run)
            log.unlink()
            run.with_suffix(".yaml").unlink()
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
