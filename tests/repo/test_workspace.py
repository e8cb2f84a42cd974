"""House rules a machine can check: metadata, imports, the commands in the docs."""

import ast
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "inl-core": "inl_core",
    "complexity-lm": "complexity_lm",
    "complexity-dit": "complexity_dit",
}
MAY_IMPORT = {
    "inl_core": {"inl_core"},
    "complexity_lm": {"inl_core", "complexity_lm"},
    "complexity_dit": {"inl_core", "complexity_dit"},
}
DOCS = [
    "README.md",
    "CONTRIBUTING.md",
    "configs/README.md",
    *(f"packages/{name}/README.md" for name in PACKAGES),
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
]


def pyproject(name: str) -> dict:
    return tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())


def source(name: str) -> Path:
    return ROOT / "packages" / name / "src" / PACKAGES[name]


def version_of(name: str) -> str:
    """The `__version__` literal of the package."""
    for node in ast.parse((source(name) / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{name} has no __version__ in its __init__.py")


def imported(path: Path, package: str) -> Iterator[str]:
    """Top-level names of the modules a file imports, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else (node.module or "").split(".")[0]


def blocks(document: str, language: str) -> list[str]:
    """Fenced code blocks of one language in a Markdown file."""
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(*program: str) -> list[list[str]]:
    """Command lines in the docs' shell blocks that start with these words."""
    lines = [
        shlex.split(line, comments=True)
        for document in DOCS
        for block in blocks(document, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [words for words in lines if tuple(words[: len(program)]) == program]


def test_the_root_is_a_workspace_and_no_package() -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "project" not in root
    assert "build-system" not in root
    assert root["tool"]["uv"]["workspace"]["members"] == ["packages/*"]
    assert set(root["tool"]["uv"]["sources"]) == set(PACKAGES)
    found = {path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml")}
    assert found == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_package_metadata(name: str) -> None:
    project = pyproject(name)["project"]
    assert project["name"] == name
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"
    assert "dev" in project["optional-dependencies"]
    assert (source(name) / "py.typed").is_file()
    assert (ROOT / "packages" / name / project["readme"]).is_file()
    licence = ROOT / "packages" / name / "LICENSE"  # a copy: a wheel takes no file from above
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()
    if "version" in project:
        assert project["version"] == version_of(name)
    else:
        assert pyproject(name)["tool"]["hatch"]["version"]["path"].endswith("__init__.py")


def test_versions_agree() -> None:
    versions = {name: version_of(name) for name in PACKAGES}
    assert len(set(versions.values())) == 1, versions
    for name in ("complexity-lm", "complexity-dit"):
        needs = {r.name: r for r in map(Requirement, pyproject(name)["project"]["dependencies"])}
        assert needs["inl-core"].specifier.contains(versions["inl-core"])


def test_inl_core_needs_torch_only() -> None:
    needs = [Requirement(line).name for line in pyproject("inl-core")["project"]["dependencies"]]
    assert needs == ["torch"]
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "inl_core"}
    # `inl_core.run`: command lines and progress of the other packages, the Hub, and adapters.
    allowed |= {"yaml", "jsonargparse", "tqdm", "huggingface_hub", "peft"}
    for path in source("inl-core").rglob("*.py"):
        assert set(imported(path, "inl_core")) <= allowed, path


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_import_only_downward(name: str) -> None:
    package = PACKAGES[name]
    for path in source(name).rglob("*.py"):
        ours = set(imported(path, package)) & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {ours}"


@pytest.mark.parametrize("name", PACKAGES)
def test_console_scripts_have_a_function(name: str) -> None:
    for target in pyproject(name)["project"].get("scripts", {}).values():
        module, function = target.split(":")
        path = source(name).parent / (module.replace(".", "/") + ".py")
        defined = {
            n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)
        }
        assert function in defined, target


def test_constraints_are_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[0-9][\w.!+-]*", line)]
    assert pins
    assert not wrong
    names = [canonicalize_name(pin.split("==")[0]) for pin in pins]
    assert len(names) == len(set(names))
    needed = {
        canonicalize_name(requirement.name)
        for name in PACKAGES
        for group in (
            pyproject(name)["project"]["dependencies"],
            *pyproject(name)["project"]["optional-dependencies"].values(),
        )
        for requirement in map(Requirement, group)
    }
    assert needed - set(PACKAGES) <= set(names)


def unsafe_load(call: ast.Call) -> bool:
    """Whether a call may run code out of the file that it reads."""
    name = ast.unparse(call.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load":
        return options.get("weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return options.get("allow_pickle", "False") != "False"
    return bool(re.fullmatch(r"(c?[pP]ickle|dill|joblib|cloudpickle)\.(loads?|Unpickler)", name))


@pytest.mark.parametrize(
    ("code", "unsafe"),
    [
        ("pickle.load(f)", True),
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=True)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("np.load(p)", False),
        ("json.load(f)", False),
    ],
)
def test_unsafe_loads_are_recognised(code: str, unsafe: bool) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert unsafe_load(call) is unsafe


def test_no_pickle_is_loaded() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "packages").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Call) and unsafe_load(node))
        or (isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "joblib"))
    ]
    assert not found


def test_one_function_opens_pictures_and_names_the_formats() -> None:
    """Without `formats` Pillow hands a picture that is PostScript to Ghostscript."""
    calls = {
        path.name: {word.arg for word in node.keywords}
        for folder in ("packages", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-2:] in (["Image", "open"], ["load_image"])
    }
    assert calls == {"pictures.py": {"formats"}}


def test_make_targets_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    prose = "\n".join((ROOT / document).read_text() for document in DOCS)
    named = {words[1] for words in commands("make")} | set(re.findall(r"`make ([a-z-]+)`", prose))
    assert {"demo", "test"} <= named
    assert named <= targets
    phony = re.search(r"^\.PHONY:(.*)$", makefile, flags=re.MULTILINE)
    assert phony is not None
    assert targets == set(phony[1].split())


def test_files_that_the_docs_name_exist() -> None:
    for document in DOCS:
        text = (ROOT / document).read_text()
        for config in re.findall(r"configs/[\w/-]+\.yaml", text):
            assert (ROOT / config).is_file(), f"{document} names {config}"
    for row in re.findall(r"^\| `([^`]+)`", (ROOT / "configs/README.md").read_text(), re.MULTILINE):
        assert (ROOT / "configs" / row).is_file(), f"configs/README.md names {row}"


SUBCOMMANDS = {
    "complexity-dit": [
        "demo", "train", "encode", "autoencoder", "sample", "evaluate", "average", "compare",
        "inspect", "plan", "convert", "app",
    ],
    "complexity-lm": [
        "demo", "train", "generate", "chat", "evaluate", "tokenizer", "inspect", "export",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("program", "subcommand"),
    [(program, name) for program, names in SUBCOMMANDS.items() for name in names],
)
def test_commands_in_the_docs_exist(
    program: str,
    subcommand: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = importlib.import_module(f"{program.replace('-', '_')}.__main__").main
    used = commands(program, subcommand)
    assert used, f"no document shows {program} {subcommand}"
    monkeypatch.setattr(sys, "argv", [program, subcommand, "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    help_text = capsys.readouterr().out
    for words in used:
        for flag in (word for word in words if word.startswith("--")):
            # --labels.style is one key of the option --labels, whose keys come from the data
            option = re.escape(flag.split("=")[0].split(".")[0])
            assert re.search(rf"{option}\b", help_text), f"{flag} in {shlex.join(words)}"


@pytest.mark.parametrize("program", SUBCOMMANDS)
def test_docs_name_no_other_command(program: str) -> None:
    named = {words[1] for words in commands(program) if not words[1].startswith("--")}
    assert named == set(SUBCOMMANDS[program])
