"""What an installed package does before anybody uses it: imports, versions, completion, wheels."""

import ast
import contextlib
import email
import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name as plain

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "inl-core": "inl_core",
    "complexity-lm": "complexity_lm",
    "complexity-dit": "complexity_dit",
}
HEAVY = {"torch", "diffusers", "transformers", "datasets", "accelerate", "gradio", "matplotlib"}


def in_a_fresh_python(code: str) -> set[str]:
    """Run code in a new interpreter; the names it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


LOADED = "print(*{name.split('.')[0] for name in sys.modules})"


def test_inl_core_imports_nothing_that_torch_has_not() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import inl_core;"
        "print(*{n.split('.')[0] for n in set(sys.modules) - before} - sys.stdlib_module_names,"
        " *{n for n in sys.modules if n.startswith(('triton', 'inl_core.kernels'))})"
    )
    assert in_a_fresh_python(code) == {"inl_core"}


@pytest.mark.parametrize("package", ["inl-core", "complexity-lm", "complexity-dit"])
def test_what_a_module_imports_the_package_asks_for(package) -> None:
    """Here everything is installed; a user has what `dependencies` name, extras aside."""
    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
    asked = {plain(re.match(r"[\w.-]+", name)[0]) for name in project["dependencies"]}
    if package == "inl-core":
        asked |= {
            "triton",
            "pyyaml",
            "jsonargparse",
        }  # torch's, on Linux; of the extra `settings`, for `run/`
    asked |= {package}
    homes = packages_distributions()
    missing = set()
    for path in (ROOT / "packages" / package / "src").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # not within functions: those are for extras
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in (name.partition(".")[0] for name in names):
                found = {plain(home) for home in homes.get(name, [name])}
                if name not in sys.stdlib_module_names and not found & asked:
                    missing.add(f"{path.name}: {name}")
    assert not missing


@pytest.mark.parametrize(
    ("imports", "unwanted"),
    [
        ("complexity_dit; complexity_dit.UserError; dir(complexity_dit)", HEAVY),
        ("complexity_dit.pipelines.pipeline", {"datasets", "pandas"}),
        ("complexity_lm", {"datasets", "jsonargparse", "matplotlib", "tensorboard"}),
    ],
)
def test_an_import_loads_no_training_stack(imports, unwanted) -> None:
    assert not in_a_fresh_python(f"import sys, {imports}; {LOADED}") & unwanted


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_says_nothing_of_a_command_imports_none(option) -> None:
    code = (
        "import atexit, sys; from complexity_dit.__main__ import main;"
        f"atexit.register(lambda: exec({LOADED!r}));"
        f"sys.argv = ['complexity-dit', {option!r}]; main()"
    )
    names = in_a_fresh_python(code)
    assert "complexity-dit" in names
    assert not names & HEAVY


@pytest.mark.parametrize("program", ["complexity-dit", "complexity-lm"])
def test_version_and_completion(program, monkeypatch, capsys) -> None:
    package = importlib.import_module(program.replace("-", "_"))
    main = importlib.import_module(f"{package.__name__}.__main__").main
    monkeypatch.setattr(sys, "argv", [program, "--version"])
    with contextlib.suppress(SystemExit):
        main()
    assert capsys.readouterr().out == f"{program} {package.__version__}\n"

    pytest.importorskip("shtab", reason="completion needs the package shtab")
    monkeypatch.setattr(sys, "argv", [program, "--print_completion=shtab-bash"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    script = capsys.readouterr().out
    assert f"-F _shtab_{package.__name__} {program}\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for word in ("train", "evaluate", "--optim.lr"):
        assert word in script, word


@pytest.mark.slow
def test_wheels(tmp_path) -> None:
    for tool in ("build", "hatchling", "twine"):
        pytest.importorskip(tool, reason="wheels need the dependency group release")
    for name in PACKAGES:
        run("-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT / "packages" / name)
    run("-m", "twine", "check", "--strict", *tmp_path.iterdir())
    for name, package in PACKAGES.items():
        (wheel,) = tmp_path.glob(f"{package}-*.whl")
        with zipfile.ZipFile(wheel) as file:
            inside = set(file.namelist())
            (metadata,) = (n for n in inside if n.endswith(".dist-info/METADATA"))
            about = email.message_from_bytes(file.read(metadata))
        source = ROOT / "packages" / name / "src"
        expected = {
            str(path.relative_to(source))
            for path in (source / package).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        assert {n for n in inside if ".dist-info/" not in n} == expected
        assert any(n.endswith("licenses/LICENSE") for n in inside)
        always = [r for r in about.get_all("Requires-Dist") if "extra ==" not in r]
        if name == "inl-core":
            assert [r.split(">")[0] for r in always] == ["torch"]
        else:
            assert any(r.startswith("inl-core") for r in always)
        (sdist,) = tmp_path.glob(f"{package}-*.tar.gz")
        with tarfile.open(sdist) as file:
            members = {Path(n).name for n in file.getnames()}
        assert {"pyproject.toml", "README.md", "LICENSE", "__init__.py"} <= members

    # From the wheels alone, away from the sources; torch and the others are this environment's.
    home = tmp_path / "installed"
    wheels = [str(path) for path in tmp_path.glob("*.whl")]
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", home, *wheels)
    code = (
        f"import sys; sys.path.insert(0, {str(home)!r}); import complexity_dit, inl_core;"
        "print(inl_core.__file__, complexity_dit.__file__, inl_core.INLDynamics(4).hidden_size)"
    )
    done = run("-c", code, cwd=tmp_path)
    assert done.count(str(home)) == 2
    for script in ("complexity-dit", "complexity-lm"):
        assert (home / "bin" / script).is_file()


def run(*arguments: object, cwd: Path | None = None) -> str:
    """Run this Python; what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
