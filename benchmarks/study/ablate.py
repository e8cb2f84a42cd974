"""Ablations: a grid of named networks and seeds, run one after the other or in processes.

    python -m benchmarks.study.ablate list   configs/ablations/lm.yaml
    python -m benchmarks.study.ablate time   configs/ablations/lm.yaml --rows benchmarks/results.csv
    python -m benchmarks.study.ablate run    configs/ablations/lm.yaml --out runs/ablate-lm \
        --seeds 0 --rows benchmarks/results.csv
    python -m benchmarks.study.ablate report configs/ablations/lm.yaml --runs runs/ablate-lm \
        --rows benchmarks/results.csv --into docs/results/dynamics

A study names its networks (configs/README.md): `plain` ones without dynamics and `variants`. A cell
is a network and a seed, trained by the trainer of the package in `OUT/NETWORK/seed-S/run`;
`cell.json` is written when it is measured. Finished cells are not run again and killed ones resume
from their last checkpoint, so the same command does the rest. A run whose loss is not finite is a
result as well: the step at which it ended.

There are two fair comparisons with the plain network. *Equal parameters*: the plain network of the
nearest size, with a wider MLP, after as many steps. *Equal time*: the plain network after as many
more steps as fit in the time of the variant. `time` measures the ratio of step times, steps of all
networks in turn, so that a busy machine slows all alike. The study also trains the plain network
for `longer` runs, each with a full schedule, and interpolates the loss at that ratio, linearly in
the logarithm of the steps. Beyond the longest run there is no number.

`report` prints the tables of a study; `--into FOLDER` also writes its figures, those over depth
with `--runs` only. `--override data.source=NAME` takes the corpus by its name in the rows.
"""

import argparse
import json
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common.fields import overridden, override_flag
from benchmarks.common.results import append_rows, as_rows, commit, read_rows
from benchmarks.common.timing import DEVICE, paired
from benchmarks.study.ablation_labs import LABS
from benchmarks.study.ablation_study import BASELINE, expanded, read_study, shape_of

from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file

DIVERGED = re.compile(r"step (\d+): loss (\S+), gradient norm")


def cell_folder(out, network, seed):
    return out / re.sub(r"[^\w.-]+", "-", network.name) / f"seed-{seed}"


def write_json(path, content):
    with atomic_file(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def run_cell(study, name, seed, out, overrides, started_from, fid):
    """Train and measure one cell where that is missing; returns the content of its JSON file."""
    lab, network = LABS[study.package], study.networks[name]
    folder = cell_folder(out, network, seed)
    config = study.config(lab, network, seed, folder / "run", overrides)
    shape, done = shape_of(config, network), folder / "cell.json"
    folder.mkdir(parents=True, exist_ok=True)
    cell = json.loads(done.read_text()) if done.exists() else None
    if cell is None:
        cell = {"case": name, "shape": shape, "commit": started_from}
        try:
            lab.train(config, network.swap)
        except UserError as error:
            found = DIVERGED.match(str(error))
            if not found:
                raise
            cell |= {"metrics": {"diverged": (int(found[1]), "step")}, "profile": {}}
        else:
            metrics, profile = lab.metrics(config, network.swap)
            cell |= {"metrics": metrics, "profile": profile}
        write_json(done, cell)
    elif cell["shape"] != shape:
        raise ValueError(
            f"{folder} holds another run ({cell['shape']}, wanted {shape}): the study or "
            "--override has changed; choose another --out"
        )
    if fid and "fid" not in cell and "diverged" not in cell["metrics"]:
        cell["fid"] = lab.fid(config, network.swap, **fid, out=folder / "evaluation")
        write_json(done, cell)
    return cell


def add_missing_rows(path, bench, cells, command):
    """Append rows of cells that the file does not have, also those lost by an earlier kill."""
    known = {(r["bench"], r["case"], r["shape"], r["metric"]) for r in read_rows(path)}
    for cell in cells:
        values = cell["metrics"] | cell.get("fid", {})
        rows = [
            row
            for row in as_rows(values, cell["case"], shape=cell["shape"])
            if (bench, cell["case"], cell["shape"], row["metric"]) not in known
        ]
        if rows:
            append_rows(path, bench, rows, DEVICE, command=command, commit=cell["commit"])


def run(study, options, overrides):
    """Run all cells of a call; one process writes the rows."""
    started_from = commit()
    names = chosen(study, options.only)
    lab = LABS[study.package]
    fid = None
    if options.fid:
        if study.package != "dit":
            raise ValueError("--fid is for studies of the image model")
        fid = {
            "num_images": options.fid,
            "evaluations": options.evaluations,
            "weights": options.weights,
        }
    command = f"python -m benchmarks.study.ablate run configs/ablations/{study.name}.yaml"
    command += override_flag([x for x in options.override if not x.startswith("data.source=")])

    def finished(cell):
        numbers = ", ".join(f"{k} {v:.5g}" for k, (v, _) in list(cell["metrics"].items())[:4])
        print(f"{cell['case']}, {cell['shape']}: {numbers}", flush=True)
        if options.rows:
            add_missing_rows(options.rows, lab.bench, [cell], command)

    work = [
        (study, name, seed, options.out, overrides, started_from, fid)
        for seed in options.seeds
        for name in names
    ]
    if options.jobs == 1:
        for arguments in work:
            finished(run_cell(*arguments))
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_cell, *arguments) for arguments in work]):
            finished(future.result())


def measure_steps(study, options, overrides):
    """Step times of all networks in turn: medians, and medians of ratios to the baseline."""
    lab, steps, sizes, rows = LABS[study.package], {}, {}, []
    for name in chosen(study, options.only):
        network = study.networks[name]
        if network.longer != 1.0:
            continue
        config = study.config(lab, network, 0, "unused", overrides)
        steps[name], sizes[name] = lab.step(config, network.swap)
    if next(iter(steps)) != BASELINE:
        raise ValueError(f"the first of --only must be {BASELINE}: the others are compared with it")
    for name, (seconds, ratio) in paired(steps, options.rounds, "cpu", rotate=True).items():
        print(f"{name:32} {sizes[name]:10,} {1000 * seconds:8.1f} ms {ratio:6.3f}")
        values = {"step": (seconds, "s"), "step ratio": (ratio, f"x {BASELINE}")}
        rows += as_rows(values, name, shape=f"{options.rounds} rounds")
    if options.rows:
        command = f"python -m benchmarks.study.ablate time configs/ablations/{study.name}.yaml"
        append_rows(options.rows, lab.bench, rows, "cpu", command=command)


def chosen(study, only):
    """Names of the networks of a call; None is all of them."""
    if unknown := set(only or ()) - set(study.networks):
        raise ValueError(
            f"unknown networks {sorted(unknown)}, choose from: {', '.join(study.networks)}"
        )
    return [name for name in study.networks if only is None or name in only]


def main():
    """Run one of the four commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["list", "time", "run", "report"])
    parser.add_argument("study", type=Path, help="a YAML file of configs/ablations")
    parser.add_argument("--out", type=Path, help="run: folder of the cells")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of networks; by default all")
    parser.add_argument("--jobs", type=int, default=1, help="run: cells in parallel processes")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--rounds", type=int, default=15, help="time: steps of each network")
    parser.add_argument("--fid", type=int, default=0, help="run, dit: images for FID; 0 for none")
    parser.add_argument("--evaluations", type=int, default=20, help="of the network per image")
    parser.add_argument("--weights", default="auto", help="of the feature network")
    parser.add_argument("--rows", help="CSV to add rows to or read them from")
    parser.add_argument("--runs", type=Path, help="report: folder of the cells, for depth profiles")
    parser.add_argument("--into", type=Path, help="report: folder for the figures")
    options = parser.parse_args()
    study = read_study(options.study)
    overrides = {key: expanded(value) for key, value in overridden(options.override).items()}
    if options.command == "list":
        for name, network in study.networks.items():
            changes = [f"{k}={v}" for k, v in network.fields.items()]
            changes += [f"swap={network.swap}"] if network.swap else []
            print(f"{name:32} {', '.join(changes)}")
    elif options.command == "time":
        measure_steps(study, options, overrides)
    elif options.command == "run":
        if options.out is None:
            parser.error("run needs --out")
        run(study, options, overrides)
    else:
        from benchmarks.study.ablation_report import report

        if options.rows is None:
            parser.error("report needs --rows")
        report(study, read_rows(options.rows), options, overrides)


if __name__ == "__main__":
    main()
