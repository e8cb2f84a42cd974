"""The commands of `complexity-dit` as one table, and clear messages for wrong options.

Options and their help come from the dataclasses in `config`, which load no torch. A command imports
the code that does its work when it runs, so that help pages stay fast.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from complexity_dit.config import (
    AppConfig,
    DataConfig,
    EvalConfig,
    PlanConfig,
    SampleConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        about: Its line in the help.
        run: Called with an instance of each of `configs`, then the other options by name.
        options: Its own options: {name: arguments of `add_argument`}; of type str by default.
        configs: Dataclasses whose fields are options.
        groups: Dataclasses whose fields are options with a prefix: {prefix: class}.
        skip: Fields of `configs` that are not options.
        defaults: Defaults that differ from those of `configs`.
    """

    about: str
    run: Callable[..., None]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    configs: Sequence[type] = ()
    groups: Mapping[str, type] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def parser(self) -> ArgumentParser:
        """Build a parser of the options."""
        parser = ArgumentParser(description=self.about)
        for name, arguments in self.options.items():
            default = {} if "action" in arguments else {"type": str}
            parser.add_argument(name, **default | dict(arguments))
        for config in self.configs:
            parser.add_class_arguments(config, None, skip=set(self.skip))
        for name, config in self.groups.items():
            parser.add_class_arguments(config, name)
        parser.set_defaults(dict(self.defaults))
        return parser

    def __call__(self, options: dict[str, Any]) -> None:
        """Run with parsed options, {name: value}."""
        options = {name: value for name, value in options.items() if name != "config"}
        configs = []
        for config in self.configs:
            names = [field.name for field in dataclasses.fields(config)]
            configs.append(config(**{name: options.pop(name) for name in names if name in options}))
        self.run(*configs, **options)


def _demo(out: str) -> None:
    from complexity_dit.cli.demo import demo

    demo(out)


def _train(config: TrainConfig) -> None:
    from complexity_dit.training.train import train

    folder = train(config)
    print(f"the {folder.name} is in {folder}")


def _encode(config: DataConfig, **options: Any) -> None:
    from complexity_dit.data.encode import encode

    print(f"the latents are in {encode(config, **options)}")


def _sample(config: SampleConfig, **options: Any) -> None:
    from complexity_dit.pipelines.sampling import sample

    sample(**options, sampling=config)


def _evaluate(config: EvalConfig, **options: Any) -> None:
    from complexity_dit.evaluation.evaluate import evaluate

    evaluate(**options, config=config)


def _compare(first: str, second: str, allow: list[str]) -> None:
    from complexity_dit.evaluation.report import compare

    print(compare(first, second, allow))


def _inspect(path: str) -> None:
    from complexity_dit.cli.inspect import inspect

    print(yaml.safe_dump(inspect(path), sort_keys=False), end="")


def _plan(run: TrainConfig, config: PlanConfig) -> None:
    from complexity_dit.training.plan import plan

    print(plan(run, config))


def _convert(checkpoint: str, out: str) -> None:
    from complexity_dit.cli.convert import convert

    print(convert(checkpoint, out).summary())


def _app(config: AppConfig, pipeline: str) -> None:
    from complexity_dit.app.server import serve

    serve(pipeline, config)


_CONFIG = {"--config": {"action": "config", "help": "a YAML file with any of the options below"}}
_PIPELINE = {"pipeline": {"help": "pipeline folder or Hub id"}}

COMMANDS = {
    "demo": Command(
        "Train on the embedded art set, sample and evaluate.",
        _demo,
        {"--out": {"default": "runs/demo", "help": "folder of the demo"}},
    ),
    "train": Command("Train a model, or resume a run.", _train, _CONFIG, [TrainConfig]),
    "encode": Command(
        "Encode images into latents for training, with a VAE.",
        _encode,
        {
            "--out": {"required": True, "help": "folder of the latents"},
            "--batch_size": {"type": int, "default": 16, "help": "images per call of the VAE"},
            "--part_size": {"type": int, "default": 512, "help": "images per file"},
        },
        [DataConfig],
        skip=frozenset({"balanced_labels"}),
        defaults={"resolution": 128},
    ),
    "sample": Command(
        "Sample images from a trained pipeline.",
        _sample,
        {
            **_PIPELINE,
            "--out": {"required": True, "help": "FILE.png (grid), FILE.npz, or a folder of PNGs"},
            "--num_images": {"type": int | None, "default": None, "help": "number of images"},
            "--labels": {
                "type": dict[str, list[str]] | None, "default": None,
                "help": "--labels.style NAME [NAME ...] for any label field; several alternate",
            },
            "--overwrite": {"type": bool, "default": False, "help": "replace what --out holds"},
        },
        [SampleConfig],
    ),
    "evaluate": Command(
        "Measure FID, KID and more of a pipeline or of images.",
        _evaluate,
        {
            "target": {
                "help": "pipeline folder or Hub id, a folder of images, an .npz with arr_0, or a "
                "source (its training images)"
            },
            "--reference": {
                "required": True,
                "help": "art | imagefolder:PATH | hub:NAME (their held-out images), a folder, or "
                "an .npz of images or statistics",
            },
            "--out": {"default": "runs/evaluation", "help": "for result.json and report.html"},
            "--data": {
                "type": DataConfig | None, "default": None,
                "help": "how the reference is read; by default as in the pipeline's training",
            },
        },
        [EvalConfig],
        {"sample": SampleConfig},
    ),
    "compare": Command(
        "Compare two results that were measured with the same settings.",
        _compare,
        {
            "first": {"help": "a result.json, or its folder"},
            "second": {"help": "another"},
            "--allow": {
                "type": list[str], "default": [],
                "help": "settings that may differ, e.g. --allow [sample.guidance_scale]",
            },
        },
    ),
    "inspect": Command(
        "Describe a pipeline, a checkpoint or a run.",
        _inspect,
        {"path": {"help": "pipeline folder or Hub id, checkpoint, or folder of a run"}},
    ),
    "plan": Command(
        "Estimate the parameters, FLOPs, memory and steps of a run.",
        _plan,
        _CONFIG,
        [TrainConfig, PlanConfig],
    ),
    "convert": Command(
        "Convert a checkpoint of the authors' research code into a pipeline to train from.",
        _convert,
        {
            "checkpoint": {"help": "state dict of the research code, one safetensors file"},
            "--out": {"required": True, "help": "pipeline folder to write, for train --init_from"},
        },
    ),
    "app": Command(
        "Serve a page that samples images in the browser; needs the extra [app].",
        _app,
        _PIPELINE,
        [AppConfig],
    ),
}  # fmt: skip


# Error messages for wrong options: the value, what was expected, the nearest names.

_UNKNOWN = re.compile(r"does not accept option '([^']+)'|Option '([^']+)' is not accepted")
"""How the parser reports an unknown field of a YAML, and one inside an optional group."""


def explain(message: str, arguments: Sequence[str], commands: Mapping[str, ArgumentParser]) -> str:
    """Explain what is wrong with a command line or the YAML that it names.

    Args:
        message: The error of the parser.
        arguments: The command line.
        commands: The parser of each command.

    Returns:
        One line that names the value, what was expected, and the nearest names.
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is None:
        return f"no command: choose one of {', '.join(commands)}"
    if command not in commands:
        names = ", ".join(commands)
        return f"unknown command {command!r}{_nearest(command, commands)}; the commands are {names}"
    help_line = f"see complexity-dit {command} --help"
    unknown = [name for match in _UNKNOWN.findall(message) for name in match if name]
    group = re.match(r'Parser key "([^"]+)"', message)
    if unknown and group:
        unknown = [f"{group[1]}.{name}" for name in unknown]
    if message.startswith("unrecognized arguments:"):
        words = message.partition(":")[2].split()
        unknown = [w.lstrip("-").partition("=")[0] for w in words if w.startswith("--")]
        if not unknown:
            return f"{command} takes no {' '.join(words)!r}; {help_line}"
    if unknown:
        names = _field_names(commands[command])
        parts = [f"unknown field {name!r}{_nearest(name, names)}" for name in unknown]
        return f"{'; '.join(parts)}; {help_line}"
    return f"{_wrong_value(message)}; {help_line}"


def _field_names(parser: ArgumentParser) -> list[str]:
    """The dotted names of all fields of a command."""
    names = []
    for name, _ in parser.get_defaults().items():
        names.append(name)
        if name == "data":  # an optional group has no fields among the defaults
            names += [f"data.{field.name}" for field in dataclasses.fields(DataConfig)]
    return names


def _nearest(word: str, known: Iterable[str]) -> str:
    """The nearest names: in the same group, else by their last part (`lr` for `optim.lr`)."""
    group, _, last = word.rpartition(".")
    same_group = [name for name in known if name.rpartition(".")[0] == group]
    for names in (same_group, list(known)):
        by_last: dict[str, list[str]] = {}
        for name in names:
            by_last.setdefault(name.rpartition(".")[2], []).append(name)
        close = difflib.get_close_matches(last, by_last, n=2, cutoff=0.65)
        near = [name for end in ([last] if last in by_last else close) for name in by_last[end]]
        if near:
            return f": did you mean {' or '.join(near[:3])}?"
    return ""


def _wrong_value(message: str) -> str:
    """A message about a value of the wrong type, from the longer one of the parser."""
    key = re.match(r'Parser key "([^"]+)":\s*', message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    kinds = re.findall(r"Expected an? (.+?)(?:\. Got|\n|$)", message)
    if key and given and kinds:
        expected = " or ".join(_plain_type(kind) for kind in kinds)
        return f"{key[1]} is {given[1].strip()!r}; expected {expected}"
    text = message[key.end() :] if key else message
    return (f"{key[1]}: " if key else "") + "; ".join(
        line.strip(" -:") for line in text.splitlines() if line.strip()
    )


def _plain_type(kind: str) -> str:
    kind = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind).replace("NoneType", "null")
    return re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind)
