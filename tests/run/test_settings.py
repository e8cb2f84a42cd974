"""Settings are data: whatever a file or a command line holds, no code runs and nothing hangs."""

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from complexity_dit import __main__ as dit
from complexity_dit import config as dit_config
from complexity_lm import __main__ as lm
from complexity_lm import config as lm_config
from inl_core.run.commands import REQUIRED, field_names, group_class
from inl_core.run.errors import UserError
from inl_core.run.json_files import fits
from inl_core.run.settings import MAX_SETTINGS_BYTES, parse_yaml, read_settings

PROGRAMS = {"dit": dit.PROGRAM, "lm": lm.PROGRAM}
COMMANDS = [(p, name) for p, program in PROGRAMS.items() for name in program.commands]


def kinds(program: str, command: str) -> dict[str, Any]:
    """Type of every field of a command, by dotted name, groups included."""
    found = dict(PROGRAMS[program].commands[command].kinds())
    queue = list(found.items())
    for prefix, kind in queue:
        if (cls := group_class(kind)) is not None:
            inner = {f"{prefix}.{name}": one for name, one in get_type_hints(cls).items()}
            found |= inner
            queue += inner.items()
    return found


def parse(program: str, command: str, *words: str) -> Any:
    """Parse a command line in which everything that must be given is given."""
    own = PROGRAMS[program].commands[command]
    needed = [f"--{n}=x" for n, one in own.options.items() if one.default is REQUIRED]
    return PROGRAMS[program].parse([command, *["x"] * len(own.arguments), *needed, *words])


def parts(kind: Any) -> set[Any]:
    return {kind} | {inner for one in get_args(kind) for inner in parts(one)}


@pytest.mark.parametrize(("program", "command"), COMMANDS)
def test_every_field_has_a_type_of_data(program, command):
    plain = {bool, int, float, str, type(None)}
    for name, kind in kinds(program, command).items():
        for part in parts(kind):
            if not (get_args(part) or part in plain or isinstance(part, str)):
                assert dataclasses.is_dataclass(part), (name, part)


def as_dict(value: Any) -> Any:
    """Instances of dataclasses anywhere within lists and mappings as mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_dict(vars(value))
    if isinstance(value, list):
        return [as_dict(one) for one in value]
    return {k: as_dict(v) for k, v in value.items()} if isinstance(value, dict) else value


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(is_plain(one) for one in value.values())
    if isinstance(value, list | tuple):
        return all(is_plain(one) for one in value)
    return type(value) in (bool, int, float, str, type(None))


@pytest.mark.parametrize(("program", "command"), COMMANDS)
def test_no_field_imports_what_a_value_names(program, command, tmp_path, monkeypatch):
    (tmp_path / "marker.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    own, path = PROGRAMS[program].commands[command], tmp_path / "run.yaml"
    name_only = "{class_path: marker.Thing}"
    spec = "{class_path: marker.Thing, init_args: {args: id, shell: true}}"
    tag = "!!python/object/apply:marker.Thing [x]"
    for name in kinds(program, command):
        for value in (name_only, spec, f"{{a: {spec}}}", f"[{spec}]", "marker.Thing", tag):
            path.write_text(name.replace(".", ": {") + f": {value}" + "}" * name.count("."))
            for words in ([f"--{name}={value}"], [f"--config={path}"] * own.has_config):
                try:
                    parsed = parse(program, command, *words)
                except UserError:
                    continue
                assert is_plain(as_dict([*parsed[1], parsed[2]]))
    assert not (tmp_path / "imported").exists()
    assert "marker" not in sys.modules


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels))]
    return "\n".join(lines)


REFUSED = {
    "an alias bomb": (bomb(40), "line 1: anchors and aliases"),
    "an alias within itself": ("&a [*a]", "anchors and aliases"),
    "a merge": ("a: &a {steps: 1}\n<<: *a", "anchors and aliases"),
    "an object": ("steps: !!python/object/apply:os.system [id]", "tags such as"),
    "a standard tag": ("steps: !!int 3", "tags such as"),
    "a tag of its own": ("steps: !x 3", "tags such as"),
    "a doubled key": ("steps: 1\nout: x\nsteps: 2", "line 3: the key 'steps' occurs twice"),
    "a doubled inner key": ("optim: {lr: 1, lr: 2}", "the key 'lr' occurs twice"),
    "a key that is a list": ("[a]: 1", "a key is a list"),
    "deep lists": ("steps: " + "[" * 5000, "nested deeper than 50"),
    "deep mappings": ("{a: " * 5000, "nested deeper than 50"),
    "two documents": ("steps: 1\n---\nsteps: 2", "more than one document"),
    "a broken list": ("a: [1\nb: }", "line 2"),
    "a list": ("- steps", "expected fields and values"),
    "nothing": ("", "expected fields and values"),
    "control characters": ("out: \x00", "control characters are not allowed"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_settings_file_may_not_hold(tmp_path, program, what):
    text, words = REFUSED[what]
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run.yaml cannot be read as settings") as error:
        parse(program, "train", f"--config={tmp_path}/run.yaml")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_word_of_the_command_line_is_read_within_the_same_limits(program):
    for text in (bomb(40), "&a [*a]", "[" * 5000, "{a: 1, a: 2}", "!!python/object:x {}"):
        for name in ("steps", "optim.lr", "data", "model.overrides", "optim"):
            with pytest.raises(UserError) as error:
                parse(program, "train", f"--{name}={text}")
            assert len(str(error.value)) < 300


def test_a_settings_file_is_a_regular_file_of_bounded_size(tmp_path):
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(60 * 2**30)
    (tmp_path / "long.yaml").write_text("a: " + "x" * MAX_SETTINGS_BYTES)
    for name in ("sparse.yaml", "long.yaml"):
        with pytest.raises(UserError, match="the limit is 1048576"):
            read_settings(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="expected a file"):
            read_settings(path)
    with pytest.raises(UserError, match="No such file"):
        read_settings(tmp_path / "none.yaml")


def test_no_file_is_read_in_the_place_of_a_group(tmp_path):
    (tmp_path / "data.yaml").write_text("resolution: 64")
    assert parse("dit", "train", f"--out=@{tmp_path}/data.yaml")[1][0].out[0] == "@"
    for value in (f"{tmp_path}/data.yaml", "-", "[1]"):
        with pytest.raises(UserError, match=r"^data is "):
            parse("dit", "train", f"--data={value}")
    (tmp_path / "run.yaml").write_text(f"data: {tmp_path}/data.yaml")
    with pytest.raises(UserError, match=r"^data is "):
        parse("dit", "train", f"--config={tmp_path}/run.yaml")


def read(tmp_path, text: str) -> Any:
    (tmp_path / "run.yaml").write_text(text)
    return dit.PROGRAM.parse(["train", f"--config={tmp_path}/run.yaml"])[1][0]


def test_values_in_the_forms_people_write(tmp_path):
    text = (
        "steps: 1000\noptim: {lr: 1e-3, weight_decay: 0}\ndata: {flip: no, vae: null}\n"
        "mixed_precision: 'no'\ncompile: no\nlora: {labels: {a: 'off'}}\n"
        "model: {overrides: {a: 4, b: 4.0, c: true, d: null, e: silu, f: [1, x]}}"
    )
    config = read(tmp_path, text)
    assert (config.steps, config.optim.lr, config.data.flip) == (1000, 1e-3, False)
    assert (config.mixed_precision, config.compile, config.data.vae) == ("no", "no", None)
    assert config.lora.labels == {"a": "off"}
    overrides = {"a": 4, "b": 4.0, "c": True, "d": None, "e": "silu", "f": [1, "x"]}
    assert config.model.overrides == overrides
    assert [type(x) for x in config.model.overrides.values()][:2] == [int, float]
    for name, value in overrides.items():
        written = yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]
        word = f"--model.overrides.{name}={written}"
        parsed = parse("dit", "train", word)[1][0].model.overrides
        assert parsed == {name: value}
        assert type(parsed[name]) is type(value)
    for wrong in ("steps: 1.5", "steps: true", "data: {flip: maybe}", "data: null", "out: null"):
        with pytest.raises(UserError, match="expected"):
            read(tmp_path, wrong)


def test_later_options_win_and_keys_of_mappings_are_kept(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 5\nmodel: {overrides: {a: 1}}\ndata: {flip: false}")
    words = [f"--config={tmp_path}/run.yaml", "--model.overrides.b", "2", "--data={holdout: 0.5}"]
    _, (config,), _ = dit.PROGRAM.parse(["train", "--steps=4", *words, "--seed", "-3"])
    assert (config.steps, config.seed) == (5, -3)
    assert config.model.overrides == {"a": 1, "b": 2}
    assert (config.data.flip, config.data.holdout) == (False, 0.5)


def test_what_earlier_versions_wrote_is_left_out_unless_it_did_something(tmp_path):
    groups = (dit_config.DataConfig, dit_config.ModelConfig, dit_config.ObjectiveConfig)
    off = {
        name: {key: "any" if value is ... else value for key, value in cls.RETIRED.items()}
        for name, cls in zip(("data", "model", "objective"), groups, strict=True)
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(off | {"steps": 7}))
    _, (found,), _ = parse("dit", "train", "--config", str(config))
    assert found == dit_config.TrainConfig(steps=7)
    config.write_text("objective: {direction_weight: 0.5}")
    with pytest.raises(UserError, match=r"config.yaml: direction_weight is 0.5: that was removed"):
        parse("dit", "train", "--config", str(config))


def test_printed_settings_are_read_as_the_same(tmp_path, capsys):
    with pytest.raises(SystemExit):
        dit.run(["plan", "--steps=4", "--model.overrides={a: 'no'}", "--print_config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    _, configs, _ = dit.PROGRAM.parse(["plan", f"--config={tmp_path}/run.yaml"])
    expected = dit.PROGRAM.parse(["plan", "--steps=4", "--model.overrides={a: 'no'}"])[1]
    assert configs == expected


def test_field_names_and_plain_yaml():
    assert "optim.lr" in set(field_names(dit.PROGRAM.commands["train"].kinds()))
    assert parse_yaml("a: 'b'") == {"a": "b"}


class Other:
    """A value that no setting has."""


CONFIGS = [
    cls
    for module in (dit_config, lm_config)
    for cls in vars(module).values()
    if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
]
MAY_BE_NEGATIVE = {"internal_guidance_scale", "seed", "guidance_scale", "logit_mean"}


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: f"{cls.__module__[:13]}.{cls.__name__}")
def test_a_number_out_of_range_is_refused_where_it_is_set(cls):
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kinds = {hints[field.name], *get_args(hints[field.name])}
        wrong = [] if field.name in MAY_BE_NEGATIVE else [-1]
        wrong += [math.nan, math.inf] * (float in kinds)
        for value in wrong if {int, float} & kinds else ():
            given = {field.name: (value, 1.0) if tuple in map(get_origin, kinds) else value}
            with pytest.raises(UserError, match=field.name):
                cls(**given)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: f"{cls.__module__[:13]}.{cls.__name__}")
def test_a_value_of_another_type_is_refused_where_it_is_set(cls):
    """In Python, where no parser reads it: a text for a switch would be true."""
    for name, kind in get_type_hints(cls).items():
        if name not in {field.name for field in dataclasses.fields(cls)}:
            continue
        takes_text = fits("no such choice", kind)
        for value in (Other(), *([] if takes_text else ["no such choice"])):
            with pytest.raises(UserError, match=rf"^{name} is .*; expected \w+"):
                cls(**{name: value})


def test_the_message_of_a_wrong_type_has_the_words_of_the_command_lines():
    message = "mixed_precision is 'fp8'; expected one of 'auto', 'no', 'bf16'"
    with pytest.raises(UserError, match=message):
        parse("lm", "train", "--mixed_precision", "fp8")
    wrong: dict[Any, tuple[str, Any, str]] = {
        lm_config.TrainConfig: ("mixed_precision", "fp8", message),
        lm_config.DataConfig: ("heldout_source", 3, "heldout_source is 3; expected str or null"),
        dit_config.DataConfig: ("flip", "no", "flip is 'no'; expected bool"),
    }
    for cls, (name, value, words) in wrong.items():
        with pytest.raises(UserError, match=words):
            cls(**{name: value})
