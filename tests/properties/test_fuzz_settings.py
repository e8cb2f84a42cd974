"""Fuzzing of YAML files and command lines: any input gives a value or a `UserError`.

Each row is a parser. It runs for `COMPLEXITY_FUZZ_SECONDS` (10 by default, 300 for a full run).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from complexity_dit import __main__ as dit
from complexity_dit.config import DataConfig, TrainConfig
from complexity_lm import __main__ as lm
from complexity_lm.config import TrainConfig as LMTrainConfig
from support.fuzzing import MARKS, Parser, Rows, of_file
from support.mangled import ODD, mangled_bytes, mangled_json, mangled_values

ROOT = Path(__file__).parents[2]
ROWS = Rows()
pytestmark = MARKS


def yaml_files(good: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    texts = [yaml.safe_dump(value).encode() for value in good]
    return st.one_of(
        mangled_bytes(texts),
        mangled_json(good),
        mangled_values(good).map(
            lambda value: yaml.dump(value, allow_unicode=True).encode("utf-8", "replace")
        ),
    )


def train_with(path: Path) -> list[str]:
    return ["train", "--config", str(path)]


@ROWS.row
def train_yaml(folder: Path) -> Parser:
    good = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs/dit").glob("*"))]
    good.append(asdict(TrainConfig()))
    parse = of_file(folder / "run.yaml", lambda path: dit.PROGRAM.parse(train_with(path)))
    return Parser(yaml_files(good), parse)


@ROWS.row
def lm_train_yaml(folder: Path) -> Parser:
    good = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs/lm").glob("*"))]
    good.append(asdict(LMTrainConfig()))
    parse = of_file(folder / "run.yaml", lambda path: lm.PROGRAM.parse(train_with(path)))
    return Parser(yaml_files(good), parse)


@ROWS.row
def evaluate_yaml(folder: Path) -> Parser:
    """YAML as the value of `--data`, since `evaluate` has no `--config`."""
    good = [asdict(DataConfig()), {"source": "art", "resolution": 16}]
    words = ["evaluate", "x", "--reference", "art"]

    def parse(text: bytes) -> Any:
        return dit.PROGRAM.parse([*words, f"--data={text.decode('utf-8', 'replace')}"])

    return Parser(yaml_files(good), parse)


def command_lines(names: list[str], options: list[str]) -> st.SearchStrategy[list[str]]:
    values = st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["1", "-1", "1e400", "nan", "null", "true", "[", "{", "[1,", "a: b", "{a: 1}"]
        ),
        st.sampled_from(["[" * 5000, "{" * 5000, "9" * 5000, "&a [*a]", "!!python/object:x {}"]),
        st.sampled_from(["a\nb", "\x1b[31m", "-", "--", "=", "@x", "*"]),
        ODD.map(str),
    )
    option = st.tuples(st.sampled_from(options), st.sampled_from([" ", "="]), values).map(
        lambda x: [f"--{x[0]}", x[2]] if x[1] == " " else [f"--{x[0]}={x[2]}"]
    )
    rest = st.lists(st.one_of(option, values.map(lambda value: [value])), max_size=4)
    first = st.one_of(st.sampled_from(names), st.text(max_size=6))
    lines = st.tuples(first, rest).map(lambda x: [x[0], *(word for part in x[1] for word in part)])
    asks = ("-h", "--h", "--p", "--v")  # help, completion, version: they print and exit
    return lines.filter(lambda line: not any(word.startswith(asks) for word in line))


@ROWS.row
def dit_arguments(folder: Path) -> Parser:
    names = ["train", "sample", "evaluate", "compare", "app", "plan", "encode", "convert"]
    options = [
        "out", "seed", "steps", "data", "data.source", "data.label_fields", "model.overrides", "lr",
        "model.size", "optim.lr", "lora.labels.style", "labels.style", "labels", "config", "allow",
        "num_images", "sample", "sample.seed", "reference", "measures", "port", "compile", "résumé",
    ]  # fmt: skip
    return Parser(command_lines(names, options), dit.PROGRAM.parse)


@ROWS.row
def lm_arguments(folder: Path) -> Parser:
    names = ["train", "generate", "evaluate", "tokenizer", "inspect"]
    options = [
        "out", "seed", "data", "data.source", "model.size", "config", "prompt", "temperature",
        "top_p", "stop_strings", "suppress_tokens", "eos_token_id", "tasks", "vocab_size",
    ]  # fmt: skip
    return Parser(command_lines(names, options), lm.PROGRAM.parse)


@pytest.mark.parametrize("name", ROWS)
def test_any_input_gives_a_value_or_a_plain_error(name, tmp_path):
    ROWS.check(name, tmp_path)
