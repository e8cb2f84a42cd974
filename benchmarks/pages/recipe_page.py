"""What the recipe's rows say: FID beside that of the plain row, and the rows still to be measured.

`tables.py` writes both into README.md, each between its marks.
"""

import re

MARKED = re.compile(r"(<!-- recipe: (ratios|missing) -->\n).*?(<!-- end -->)", re.DOTALL)
PLAIN = "flow-none"

# Network evaluations and seeds by training images; without a list of rows, all of them.
PLAN = {100_000: (20, (0,), None), 300_000: (50, (0, 1), (PLAIN, "full", "five", "three"))}


def measured(rows):
    """{(command, hardware, seed): {row: {metric: value}}}, of rows measured twice the last."""
    runs = {}
    for row in rows:
        run = (row["command"], row["hardware"], row["shape"])
        runs.setdefault(run, {}).setdefault(row["case"], {})[row["metric"]] = float(row["value"])
    return runs


def step_costs(rows):
    """{row: time of its training step over that of the plain one}, from `bench_step.py`."""
    return {
        row["case"]: float(row["value"])
        for row in rows
        if (row["bench"], row["metric"], row["unit"]) == ("step", "ratio", f"x {PLAIN}")
    }


def ratios(rows, costs):
    """A line for each row beside a plain one of the same command, machine and seed."""
    lines = [
        "| training images | row | seed | FID | plain | difference | ratio | step [x plain] |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (_, _, seed), cases in measured(rows).items():
        if PLAIN not in cases:
            continue
        plain = cases[PLAIN]["fid"]
        for case, values in cases.items():
            if case != PLAIN:
                images, fid = values["images"], values["fid"]
                cost = f"{costs[case]:.2f}" if case in costs else ""
                lines.append(
                    f"| {images:,.0f} | {case} | {seed.removeprefix('seed ')} | {fid:.1f} | "
                    f"{plain:.1f} | {fid - plain:+.1f} | {fid / plain:.2f} | {cost} |"
                )
    return "\n".join(lines) if len(lines) > 2 else "No rows yet."


def missing(rows):
    """Commands for what `PLAN` has and the rows have not, with the settings of the last rows."""
    from benchmarks.recipe.recipe import ROWS

    done, commands = set(), {}
    for (command, _, seed), cases in measured(rows).items():
        for case, values in cases.items():
            images = int(values["images"])
            planned = PLAN.get(images, (None,))[0]
            if values.get("evaluations", planned) == planned:
                done.add((images, case, seed))
                commands[images] = command
    lines = []
    for images, (evaluations, seeds, wanted) in PLAN.items():
        command = commands.get(
            images,
            f"python -m benchmarks.recipe.recipe ROW --images {images} --evaluations {evaluations} "
            "--num_images 2048",
        )
        for seed in seeds:
            left = [r for r in wanted or ROWS if (images, r, f"seed {seed}") not in done]
            if left:
                lines += [
                    f"for row in {' '.join(left)}; do",
                    f"  {command.replace('ROW', '$row')} \\",
                    f"    --seed {seed} --latents CACHE --out runs/recipe/{images}-{seed}/$row \\",
                    "    --rows benchmarks/results.csv",
                    "done",
                ]
    return "\n".join(["```sh", *lines, "```"]) if lines else "None."


def rewritten(document, rows):
    """The page with what stands between its marks replaced."""
    own = [row for row in rows if row["bench"] == "recipe"]
    parts = {"ratios": lambda: ratios(own, step_costs(rows)), "missing": lambda: missing(own)}
    return MARKED.sub(lambda m: f"{m[1]}\n{parts[m[2]]()}\n\n{m[3]}", document)
