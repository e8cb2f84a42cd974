"""`complexity-dit average` and `evaluate --lengths`: any average of the weights of a run.

`training.averages` says what a length is and how the snapshots of a run are combined.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from complexity_dit.config import (
    AVERAGE_FILE,
    DATA_FILE,
    DataConfig,
    EMAConfig,
    EvalConfig,
    SampleConfig,
)
from complexity_dit.data.clusters import CLUSTERS_FILE
from complexity_dit.distributed import is_main, on_main
from complexity_dit.evaluation.evaluate import EVALUATION_KIND, evaluate
from complexity_dit.evaluation.image_sets import trained_on
from complexity_dit.evaluation.report import read_result
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import find_pipeline, load_pipeline
from complexity_dit.training.averages import (
    AVERAGES_FILE,
    AVERAGES_FOLDER,
    coefficients,
    split_name,
)
from complexity_dit.training.state import check_shapes
from inl_core.run.checkpoints import all_checkpoints, check_damage, latest_checkpoint, step_of
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, open_regular
from inl_core.run.folders import claim_folder, new_folder
from inl_core.run.json_files import fits

MAX_ERROR = 0.1
"""Largest relative error of a profile that is still called the average of that length."""

# The snapshots of a run.


@dataclass(frozen=True)
class Snapshot:
    """A file of averages: its step and their lengths."""

    path: Path
    step: int
    lengths: tuple[float, ...]


def find_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run and of its newest checkpoint, by step; their checksums are verified.

    Raises:
        UserError: There are none, or one is damaged.
    """
    folders = all_checkpoints(run / AVERAGES_FOLDER)
    newest = latest_checkpoint(run / "checkpoints")
    if newest is not None and (newest / AVERAGES_FILE).is_file():
        folders = [f for f in folders if step_of(f) < step_of(newest)] + [newest]
    found = []
    for folder in folders:
        check_damage(folder)
        path = folder / AVERAGES_FILE
        try:
            open_regular(path).close()
            with safe_open(path, "np") as file:
                lengths = {split_name(name)[0] for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has a type of its own
            raise UserError(f"cannot read {path}: {error}") from error
        found.append(Snapshot(path, step_of(folder), tuple(sorted(lengths))))
    if not found:
        raise UserError(
            f"{run} has no averages to combine: train with --ema.snapshot_every, the number of "
            "steps between snapshots"
        )
    return found


def averaged(run: Path, length: float) -> tuple[ComplexityDiTPipeline, dict[str, Any]]:
    """The pipeline of a run with the average of a length, and what `average.json` says about it.

    Raises:
        UserError: The run has no snapshots, they are of another network, or do not determine that
            average (its profile would be wrong by more than `MAX_ERROR`).
    """
    EMAConfig(lengths=[length])  # refuses one that is out of range
    snapshots = find_snapshots(run)
    step = snapshots[-1].step
    parts = [(one, kept) for one in snapshots for kept in one.lengths]
    found, error = coefficients([(one.step, kept) for one, kept in parts], step, length)
    if error > MAX_ERROR:
        raise UserError(
            f"the {len(snapshots)} snapshots of {run} give length {length:g} only with an error of "
            f"{error:.0%} (at most {MAX_ERROR:.0%}): take a length nearer to those that were kept, "
            f"{', '.join(f'{kept:g}' for kept in snapshots[-1].lengths)}, or train with more "
            "snapshots"
        )
    pipe = load_pipeline(str(run))
    parameters = dict(pipe.transformer.named_parameters())
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    for snapshot in snapshots:
        by_length: dict[float, dict[str, Tensor]] = {kept: {} for kept in snapshot.lengths}
        for key, tensor in load_file(snapshot.path).items():
            kept, name = split_name(key)
            by_length[kept][name] = tensor
        for kept, tensors in by_length.items():
            check_shapes(tensors, parameters, str(snapshot.path))
            share = float(found[parts.index((snapshot, kept))])
            for name, tensor in tensors.items():
                total[name].add_(tensor.double(), alpha=share)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(total[name])
    about = {"length": length, "step": step, "snapshots": len(snapshots), "error": error}
    return pipe, about


def average(run: str, out: str, length: float | None = None, result: str | None = None) -> Path:
    """Write a pipeline folder with an average of the weights of a run.

    Args:
        run: Folder of the run.
        out: A new folder.
        length: Length of the average, a share of the training; by default the best of `result`.
        result: The result of `evaluate --lengths`; its numbers go to the model card.

    Raises:
        UserError: As `averaged`, or `out` exists, or neither a length nor a result is given.
    """
    measured = None
    if result is not None:
        measured = read_lengths(Path(result))
        if length not in (None, measured["average"]["length"]):
            raise UserError(
                f"{result} has the numbers of length {measured['average']['length']:g}, not "
                f"{length:g}: leave --length or --result out"
            )
        length = measured["average"]["length"]
    if length is None:
        raise UserError("give --length, or the --result of evaluate --lengths")
    with new_folder(Path(out)) as folder:
        pipe, about = averaged(Path(run), length)
        source = find_pipeline(Path(run))
        assert source is not None  # it was loaded
        for name in (DATA_FILE, CLUSTERS_FILE):  # what training adds to a pipeline
            if (source / name).is_file():
                shutil.copy(source / name, folder)
        (folder / AVERAGE_FILE).write_text(json.dumps(about, indent=2) + "\n")
        pipe.save_pretrained(folder, result=measured)
    print(
        f"{out} has the average of length {length:g} at step {about['step']}, of "
        f"{about['snapshots']} snapshots; error of its profile {about['error']:.2%}"
    )
    return Path(out)


# The sweep of `evaluate --lengths`.


def evaluate_lengths(
    target: str,
    reference: str,
    lengths: Sequence[float],
    out: str,
    config: EvalConfig | None = None,
    sample: SampleConfig | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """Measure averages of several lengths of a run as `evaluate` does, each in `<out>/length-L`.

    Returns:
        The result of the best length by the first distance that is measured, with `average`: its
        length, step and error, and the distance of every length. It is `<out>/result.json`.

    Raises:
        UserError: As `averaged` and `evaluate`, or no distance is among the measures.
    """
    config, folder = config or EvalConfig(quiet=True), Path(out)
    if not {"fid", "kid"} & set(config.measures):
        raise UserError(f"lengths are compared by fid or kid; measures is {config.measures}")
    with ExitStack() as held:
        on_main(lambda: held.enter_context(claim_folder(folder, EVALUATION_KIND)))
        if (folder / "result.json").exists() and not config.overwrite:
            raise UserError(f"{folder / 'result.json'} exists; choose another --out, or overwrite")
        data, results = data or trained_on(target), []
        for length in lengths:
            pipe, about = averaged(Path(target), length)
            place = folder / f"length-{length:g}"
            results.append(evaluate(pipe, reference, place, config, sample, data))
            results[-1]["average"] = about
        metric = next(iter(results[0]["metrics"]))
        best = min(results, key=lambda result: result["metrics"][metric])
        by_length = {f"{r['average']['length']:g}": r["metrics"][metric] for r in results}
        best["average"] |= {"metric": metric, "by_length": by_length}
        best["settings"]["target"] = target

        def write() -> None:
            with atomic_file(folder / "result.json") as scratch:
                scratch.write_text(json.dumps(best, indent=2, allow_nan=False) + "\n")

        on_main(write)
    if is_main():
        for length, value in by_length.items():
            print(f"length {length:<6} {metric} {value:.6g}")
        print(
            f"the best is {best['average']['length']:g}; write it with complexity-dit average "
            f"{target} --result {folder / 'result.json'} --out DIR"
        )
    return best


def read_lengths(path: Path) -> dict[str, Any]:
    """Read the result of a sweep.

    Raises:
        UserError: It is not one.
    """
    result = read_result(path)
    about = result.get("average")
    if not isinstance(about, dict) or not fits(about.get("length"), float):
        raise UserError(f"{path} is not a result of complexity-dit evaluate --lengths")
    return result
