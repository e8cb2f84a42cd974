"""Two tables of the recipe: FID next to that of the plain row, and the rows not measured yet."""

PLAIN = "flow-none"

# Training images: network evaluations, seeds and rows (None for all).
PLAN = {100_000: (20, (0,), None), 300_000: (50, (0, 1), (PLAIN, "three"))}


def measured(rows):
    """{(command, hardware, seed): {row: {metric: value}}}; of repeated rows the last counts."""
    runs = {}
    for row in rows:
        if row["bench"] != "recipe":
            continue
        run = (row["command"], row["hardware"], row["shape"])
        runs.setdefault(run, {}).setdefault(row["case"], {})[row["metric"]] = float(row["value"])
    return runs


def step_costs(rows):
    """{row: time of its training step over that of the plain one}, from rows of `bench_step.py`."""
    return {
        row["case"]: float(row["value"])
        for row in rows
        if (row["bench"], row["metric"], row["unit"]) == ("step", "ratio", f"x {PLAIN}")
    }


def ratios(rows):
    """One line per row that has a plain row of the same command, machine and seed."""
    costs = step_costs(rows)
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
    return "\n".join(lines) if len(lines) > 2 else ""


def missing(rows):
    """Commands for the runs of `PLAN` without rows, with the settings of the last rows."""
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
