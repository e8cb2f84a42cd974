"""The commands of `complexity-dit`: what each is for, its options, and what it does with them.

Options and their help come from the dataclasses they fill. Imports are inside: a command costs what
it needs, and a page of help does not wait for diffusers.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jsonargparse import ArgumentParser

from complexity_dit.config import DataConfig

# Wrong options in plain words: what was written, what was expected, what was probably meant.

_UNKNOWN = re.compile(r"does not accept option '([^']+)'|Option '([^']+)' is not accepted")
"""How the parser reports an unknown field of a YAML, and one inside an optional group."""


def explain(message: str, arguments: Sequence[str], commands: Mapping[str, ArgumentParser]) -> str:
    """Say what is wrong with a command line or the YAML it names.

    Args:
        message: What the parser said.
        arguments: What it was given.
        commands: The parser of each command.

    Returns:
        One line that names the value, what was expected, and the nearest names.
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is None:
        return f"no command: choose one of {', '.join(commands)}"
    if command not in commands:
        names = ", ".join(commands)
        return f"unknown command {command!r}{_meant(command, commands)}; the commands are {names}"
    help_line = f"see complexity-dit {command} --help"
    unknown = [name for found in _UNKNOWN.findall(message) for name in found if name]
    group = re.match(r'Parser key "([^"]+)"', message)
    if unknown and group:
        unknown = [f"{group[1]}.{name}" for name in unknown]
    if message.startswith("unrecognized arguments:"):
        words = message.partition(":")[2].split()
        unknown = [w.lstrip("-").partition("=")[0] for w in words if w.startswith("--")]
        if not unknown:
            return f"{command} takes no {' '.join(words)!r}; {help_line}"
    if unknown:
        names = field_names(commands[command])
        told = [f"unknown field {name!r}{_meant(name, names)}" for name in unknown]
        return f"{'; '.join(told)}; {help_line}"
    return f"{_wrong_value(message)}; {help_line}"


def field_names(parser: ArgumentParser) -> list[str]:
    """The dotted names of all fields of a command."""
    names = []
    for name, _ in parser.get_defaults().items():
        names.append(name)
        if name == "data":  # a group that may be left out has no default fields
            names += [f"data.{field.name}" for field in dataclasses.fields(DataConfig)]
    return names


def _meant(word: str, known: Iterable[str]) -> str:
    """The nearest names: in the same group, else those that end alike (`lr` for `optim.lr`)."""
    group, _, last = word.rpartition(".")
    mine = [name for name in known if name.rpartition(".")[0] == group]
    for names in (mine, list(known)):
        ends: dict[str, list[str]] = {}
        for name in names:
            ends.setdefault(name.rpartition(".")[2], []).append(name)
        close = difflib.get_close_matches(last, ends, n=2, cutoff=0.65)
        near = [name for end in ([last] if last in ends else close) for name in ends[end]]
        if near:
            return f": did you mean {' or '.join(near[:3])}?"
    return ""


def _wrong_value(message: str) -> str:
    """A value of the wrong type, from the parser's page about it."""
    key = re.match(r'Parser key "([^"]+)":\s*', message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    expected = [_plain(kind) for kind in re.findall(r"Expected an? (.+?)(?:\. Got|\n|$)", message)]
    if key and given and expected:
        return f"{key[1]} is {given[1].strip()!r}; expected {' or '.join(expected)}"
    text = message[key.end() :] if key else message
    return (f"{key[1]}: " if key else "") + "; ".join(
        line.strip(" -:") for line in text.splitlines() if line.strip()
    )


def _plain(kind: str) -> str:
    kind = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind).replace("NoneType", "null")
    return re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind)


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        about: Its line in the help.
        add_options: Adds its options to a parser.
        run: Is called with the parsed options, {name: value}.
    """

    about: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[dict[str, Any]], None]


def _demo_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="runs/demo", help="folder of the demo")


def _demo(options: dict[str, Any]) -> None:
    from complexity_dit.cli.demo import demo

    demo(options["out"])


def _train_options(parser: ArgumentParser) -> None:
    from complexity_dit.config import TrainConfig

    parser.add_argument("--config", action="config", help="a YAML with any of the options below")
    parser.add_class_arguments(TrainConfig, None)


def _train(options: dict[str, Any]) -> None:
    from complexity_dit.config import TrainConfig
    from complexity_dit.training.train import train

    options.pop("config")
    folder = train(TrainConfig(**options))
    print(f"the {folder.name} is in {folder}")


def _encode_options(parser: ArgumentParser) -> None:
    from complexity_dit.config import DataConfig

    parser.add_class_arguments(DataConfig, None, skip={"balanced_labels"})
    parser.add_argument("--out", type=str, required=True, help="folder of the latents")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures in a call of the VAE")
    parser.add_argument("--part_size", type=int, default=512, help="pictures in a file")
    parser.set_defaults(resolution=128)


def _encode(options: dict[str, Any]) -> None:
    from complexity_dit.config import DataConfig
    from complexity_dit.data.encode import encode

    own = {name: options.pop(name) for name in ("out", "batch_size", "part_size")}
    print(f"the latents are in {encode(DataConfig(**options), **own)}")


def _sample_options(parser: ArgumentParser) -> None:
    from complexity_dit.config import SampleConfig

    parser.add_argument("pipeline", type=str, help="pipeline folder or Hub id")
    parser.add_argument(
        "--out", type=str, required=True, help="FILE.png (grid), FILE.npz, or a folder of PNGs"
    )
    parser.add_argument("--num_images", type=int | None, default=None, help="how many")
    parser.add_argument(
        "--labels",
        type=dict[str, list[str]] | None,
        default=None,
        help="--labels.style NAME [NAME ...] for any label field; several names take turns",
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace what --out has")
    parser.add_class_arguments(SampleConfig, None)


def _sample(options: dict[str, Any]) -> None:
    from complexity_dit.config import SampleConfig
    from complexity_dit.pipelines.sampling import sample

    own = {k: options.pop(k) for k in ("pipeline", "out", "num_images", "labels", "overwrite")}
    sample(**own, sampling=SampleConfig(**options))


def _evaluate_options(parser: ArgumentParser) -> None:
    from complexity_dit.config import DataConfig, EvalConfig, SampleConfig

    parser.add_argument(
        "target",
        type=str,
        help="pipeline folder or Hub id, a folder of pictures, an .npz with arr_0, or a source "
        "(its training pictures)",
    )
    parser.add_argument(
        "--reference",
        type=str,
        required=True,
        help="art | imagefolder:PATH | hub:NAME (their held-out pictures), a folder, or an .npz "
        "of pictures or statistics",
    )
    parser.add_argument(
        "--out", type=str, default="runs/evaluation", help="gets result.json and report.html"
    )
    parser.add_class_arguments(EvalConfig, None)
    parser.add_class_arguments(SampleConfig, "sample")
    parser.add_argument(
        "--data",
        type=DataConfig | None,
        default=None,
        help="how the reference is read; as in the pipeline's training by default",
    )


def _evaluate(options: dict[str, Any]) -> None:
    from complexity_dit.config import EvalConfig
    from complexity_dit.evaluation.evaluate import evaluate

    own = {k: options.pop(k) for k in ("target", "reference", "out", "sample", "data")}
    evaluate(**own, config=EvalConfig(**options))


def _compare_options(parser: ArgumentParser) -> None:
    parser.add_argument("first", type=str, help="a result.json, or its folder")
    parser.add_argument("second", type=str, help="another")
    parser.add_argument(
        "--allow",
        type=list[str],
        default=[],
        help="settings that may differ, e.g. --allow [sample.guidance_scale]",
    )


def _compare(options: dict[str, Any]) -> None:
    from complexity_dit.evaluation.report import compare

    print(compare(options["first"], options["second"], options["allow"]))


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=str, help="pipeline folder or Hub id, checkpoint, or run")


def _inspect(options: dict[str, Any]) -> None:
    import yaml

    from complexity_dit.cli.inspect import inspect

    print(yaml.safe_dump(inspect(options["path"]), sort_keys=False), end="")


def _plan_options(parser: ArgumentParser) -> None:
    from complexity_dit.config import PlanConfig, TrainConfig

    parser.add_argument("--config", action="config", help="the YAML of the run")
    parser.add_class_arguments(TrainConfig, None)
    parser.add_class_arguments(PlanConfig, None)


def _plan(options: dict[str, Any]) -> None:
    from complexity_dit.config import PlanConfig, TrainConfig
    from complexity_dit.training.plan import plan

    options.pop("config")
    own = {field.name: options.pop(field.name) for field in fields(PlanConfig)}
    print(plan(TrainConfig(**options), PlanConfig(**own)))


def _convert_options(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help="their state dict, one safetensors file")
    parser.add_argument("--out", type=str, required=True, help="pipeline folder to train on from")


def _convert(options: dict[str, Any]) -> None:
    from complexity_dit.cli.convert import convert

    print(convert(options["checkpoint"], options["out"]).summary())


def _app_options(parser: ArgumentParser) -> None:
    from complexity_dit.config import AppConfig

    parser.add_argument("pipeline", type=str, help="pipeline folder or Hub id")
    parser.add_class_arguments(AppConfig, None)


def _app(options: dict[str, Any]) -> None:
    from complexity_dit.app.server import serve
    from complexity_dit.config import AppConfig

    serve(options.pop("pipeline"), AppConfig(**options))


COMMANDS = {
    "demo": Command("Train on the embedded art set, paint, measure.", _demo_options, _demo),
    "train": Command("Train a model, or go on with a run.", _train_options, _train),
    "encode": Command(
        "Turn pictures into latents to train on, with a VAE.", _encode_options, _encode
    ),
    "sample": Command("Paint with a trained pipeline.", _sample_options, _sample),
    "evaluate": Command(
        "FID, KID and more of a pipeline or of pictures.", _evaluate_options, _evaluate
    ),
    "compare": Command(
        "Two results side by side, if they were measured alike.", _compare_options, _compare
    ),
    "inspect": Command(
        "Say what a pipeline, a checkpoint or a run holds.", _inspect_options, _inspect
    ),
    "plan": Command(
        "What a run will need: parameters, FLOPs, memory, steps.", _plan_options, _plan
    ),
    "convert": Command(
        "Take over what maps from a checkpoint of the authors' research code.",
        _convert_options,
        _convert,
    ),
    "app": Command("Paint in the browser; needs the extra [app].", _app_options, _app),
}
