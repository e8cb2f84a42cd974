"""Structure of the code in numbers: files, lines, longest functions, import circles, inner imports.

    python tests/repo/structure.py [ROOT] [--trace]

`--trace` also counts the files of our packages that one training step, one image of a pipeline and
one evaluation enter (by `sys.setprofile`); it trains a small model, which takes about a minute.
"""

import argparse
import ast
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PACKAGES = {
    "inl-core": "inl_core",
    "complexity-lm": "complexity_lm",
    "complexity-dit": "complexity_dit",
}


def source_files(root: Path, package: str) -> dict[str, Path]:
    """Module name -> file of every module of a package."""
    source = root / "packages" / package / "src"
    names = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """Modules of the same package that a file imports, and whether inside a function.

    Imports for type checkers alone (`if TYPE_CHECKING`) are left out: they never run.
    """
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            found = [
                full if (full := f"{base}.{alias.name}") in modules else base
                for alias in node.names
            ]
        else:
            continue
        for target in found:
            if target in modules and target != name:
                yield target, id(node) not in top


def circles(root: Path, package: str) -> list[list[str]]:
    """Groups of modules that import each other, at the top or inside functions."""
    modules = source_files(root, package)
    initial = PACKAGES[package]  # its lazy names import nothing
    edges = {
        name: {target for target, _ in imports(name, path, modules) if target != initial}
        for name, path in modules.items()
        if name != initial
    }

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for target in edges.get(stack.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        return seen

    reached = {name: reach(name) for name in edges}
    groups = {
        frozenset({name, *(n for n in reached[name] if name in reached.get(n, ()))})
        for name in edges
        if name in reached[name]
    }
    return sorted(sorted(group) for group in groups)


def inner_imports(paths: list[Path]) -> int:
    """Import statements inside functions, of whatever package."""
    count = 0
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count += sum(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(node))
    return count


def longest_function(paths: list[Path]) -> tuple[int, str]:
    """Lines and name of the longest function."""
    return max(
        (
            ((node.end_lineno or 0) - node.lineno + 1, f"{path.name}:{node.name}")
            for path in paths
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ),
        default=(0, ""),
    )


def table(root: Path) -> str:
    """The numbers as Markdown."""
    rows = ["| | files | lines | longest function | circles | imports inside functions |"]
    rows.append("|---|---|---|---|---|---|")
    total = [0, 0]
    for package in PACKAGES:
        paths = list(source_files(root, package).values())
        lines = sum(len(path.read_text().splitlines()) for path in paths)
        total = [total[0] + len(paths), total[1] + lines]
        length, name = longest_function(paths)
        rows.append(
            f"| {package} | {len(paths)} | {lines} | {length} ({name}) | "
            f"{len(circles(root, package))} | {inner_imports(paths)} |"
        )
    rows.append(f"| packages together | {total[0]} | {total[1]} | | | |")
    for folder in ("benchmarks", "tests"):
        paths = [
            path
            for path in sorted((root / folder).rglob("*.py"))
            if "fixtures" not in path.parts or path.name == "make.py"
        ]
        lines = sum(len(path.read_text().splitlines()) for path in paths)
        length, name = longest_function(paths)
        rows.append(f"| {folder} | {len(paths)} | {lines} | {length} ({name}) | | |")
    return "\n".join(rows)


@contextmanager
def entered_files() -> Iterator[set[str]]:
    """Files of our packages whose code runs while it is entered."""
    files: set[str] = set()

    def note(frame, event, argument) -> None:
        name = frame.f_code.co_filename
        if event == "call" and "/src/" in name and any(f"/{p}/" in name for p in PACKAGES.values()):
            files.add(name.partition("/src/")[2])

    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)


def traces(folder: Path) -> dict[str, set[str]]:
    """Files entered by one training step, one image of a pipeline, one evaluation."""
    from complexity_dit.config import DataConfig, EvalConfig, SampleConfig, TrainConfig
    from complexity_dit.evaluation.evaluate import evaluate
    from complexity_dit.pipelines.sampling import load_pipeline
    from complexity_dit.training import train

    data = DataConfig(resolution=16, num_images=64)
    run = TrainConfig(
        out=str(folder / "run"), steps=3, batch_size=4, data=data, report_to="none", log_every=1
    )
    step: Callable = train.optimizer_step
    found: dict[str, set[str]] = {}
    calls, tracing = 0, ExitStack()

    def traced(*arguments, **options):
        """From the second step to the third: the update, the logs and the next batch."""
        nonlocal calls
        calls += 1
        if calls == 2:
            found["one training step"] = tracing.enter_context(entered_files())
        elif calls == 3:
            tracing.close()
        return step(*arguments, **options)

    train.optimizer_step = traced
    try:
        pipeline = train.train(run)
    finally:
        train.optimizer_step = step
    pipe = load_pipeline(str(pipeline))
    with entered_files() as files:
        pipe(style="Orphism", num_inference_steps=2)
    found["one pipe(style=…)"] = files
    config = EvalConfig(num_images=4, weights="random", kid_subset_size=2, label_min=2, bootstrap=2)
    with entered_files() as files:
        evaluate(
            str(pipeline), "art", folder / "result", config, SampleConfig(num_inference_steps=2)
        )
    found["one evaluation"] = files
    return found


def main() -> None:
    """Print the table, and the traces if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    print(table(options.root))
    if options.trace:
        with tempfile.TemporaryDirectory() as folder:
            for name, files in traces(Path(folder)).items():
                print(f"\n{name}: {len(files)} files")
                print("\n".join(f"    {file}" for file in sorted(files)))


if __name__ == "__main__":
    main()
