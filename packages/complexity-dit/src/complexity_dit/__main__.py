"""The command line: `complexity-dit demo | train | encode | sample | evaluate | ...`."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from complexity_dit import __version__
from complexity_dit.errors import RunStopped, UserError


def build_parser() -> ArgumentParser:
    """All commands; options and their help come from the dataclasses they fill."""
    from complexity_dit.app_config import AppConfig
    from complexity_dit.config import TrainConfig
    from complexity_dit.data import DataConfig
    from complexity_dit.evaluate import EvalConfig
    from complexity_dit.plan import PlanConfig
    from complexity_dit.sample import SampleConfig

    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, add_print_completion_argument=True
    )
    parser = ArgumentParser(prog="complexity-dit", description=__doc__, version=__version__)
    commands = parser.add_subcommands()

    demo = ArgumentParser(description="Train on the embedded art set, paint, measure.")
    demo.add_argument("--out", type=str, default="runs/demo", help="folder of the demo")
    commands.add_subcommand("demo", demo)

    train = ArgumentParser(description="Train a model, or go on with a run.")
    train.add_argument("--config", action="config", help="a YAML with any of the options below")
    train.add_class_arguments(TrainConfig, None)
    commands.add_subcommand("train", train)

    encode = ArgumentParser(description="Turn pictures into latents to train on, with a VAE.")
    encode.add_class_arguments(DataConfig, None, skip={"balanced_labels"})
    encode.add_argument("--out", type=str, required=True, help="folder of the latents")
    encode.add_argument("--batch_size", type=int, default=16, help="pictures in a call of the VAE")
    encode.add_argument("--part_size", type=int, default=512, help="pictures in a file")
    encode.set_defaults(resolution=128)
    commands.add_subcommand("encode", encode)

    sample = ArgumentParser(description="Paint with a trained pipeline.")
    sample.add_argument("pipeline", type=str, help="pipeline folder or Hub id")
    sample.add_argument(
        "--out", type=str, required=True, help="FILE.png (grid), FILE.npz, or a folder of PNGs"
    )
    sample.add_argument("--num_images", type=int | None, default=None, help="how many")
    sample.add_argument(
        "--labels",
        type=dict[str, list[str]] | None,
        default=None,
        help="--labels.style NAME [NAME ...] for any label field; several names take turns",
    )
    sample.add_argument("--overwrite", type=bool, default=False, help="replace what --out has")
    sample.add_class_arguments(SampleConfig, None)
    commands.add_subcommand("sample", sample)

    evaluate = ArgumentParser(description="FID, KID and more of a pipeline or of pictures.")
    evaluate.add_argument(
        "target",
        type=str,
        help="pipeline folder or Hub id, a folder of pictures, an .npz with arr_0, or a source "
        "(its training pictures)",
    )
    evaluate.add_argument(
        "--reference",
        type=str,
        required=True,
        help="art | imagefolder:PATH | hub:NAME (their held-out pictures), a folder, or an .npz "
        "of pictures or statistics",
    )
    evaluate.add_argument(
        "--out", type=str, default="runs/evaluation", help="gets result.json and report.html"
    )
    evaluate.add_class_arguments(EvalConfig, None)
    evaluate.add_class_arguments(SampleConfig, "sample")
    evaluate.add_argument(
        "--data",
        type=DataConfig | None,
        default=None,
        help="how the reference is read; as in the pipeline's training by default",
    )
    commands.add_subcommand("evaluate", evaluate)

    compare = ArgumentParser(description="Two results side by side, if they were measured alike.")
    compare.add_argument("first", type=str, help="a result.json, or its folder")
    compare.add_argument("second", type=str, help="another")
    compare.add_argument(
        "--allow",
        type=list[str],
        default=[],
        help="settings that may differ, e.g. --allow [sample.guidance_scale]",
    )
    commands.add_subcommand("compare", compare)

    inspect = ArgumentParser(description="Say what a pipeline, a checkpoint or a run holds.")
    inspect.add_argument("path", type=str, help="pipeline folder or Hub id, checkpoint, or run")
    commands.add_subcommand("inspect", inspect)

    plan = ArgumentParser(description="What a run will need: parameters, FLOPs, memory, steps.")
    plan.add_argument("--config", action="config", help="the YAML of the run")
    plan.add_class_arguments(TrainConfig, None)
    plan.add_class_arguments(PlanConfig, None)
    commands.add_subcommand("plan", plan)
    convert = ArgumentParser(
        description="Take over what maps from a checkpoint of the authors' research code."
    )
    convert.add_argument("checkpoint", type=str, help="their state dict, one safetensors file")
    convert.add_argument("--out", type=str, required=True, help="pipeline folder to train on from")
    commands.add_subcommand("convert", convert)
    app = ArgumentParser(description="Paint in the browser; needs the extra [app].")
    app.add_argument("pipeline", type=str, help="pipeline folder or Hub id")
    app.add_class_arguments(AppConfig, None)
    commands.add_subcommand("app", app)
    for one in (parser, *commands.choices.values()):
        one.exit_on_error = False  # it raises instead, and `run` says it more plainly
    return parser


def run(arguments: Sequence[str]) -> None:
    """Parse and run one command."""
    parser = build_parser()
    arguments = _join_labels(arguments)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        from complexity_dit.cli_errors import explain

        commands = parser._subcommands_action
        assert commands is not None  # build_parser added them
        raise UserError(explain(str(error), arguments, commands.choices)) from None
    command = parsed.subcommand
    options = parsed[command].as_dict()
    if command == "demo":
        from complexity_dit.demo import demo

        demo(options["out"])
    elif command == "train":
        from complexity_dit.config import TrainConfig
        from complexity_dit.train import train

        options.pop("config")
        folder = train(TrainConfig(**options))
        print(f"the {folder.name} is in {folder}")
    elif command == "encode":
        from complexity_dit.data import DataConfig
        from complexity_dit.encode import encode

        own = {name: options.pop(name) for name in ("out", "batch_size", "part_size")}
        print(f"the latents are in {encode(DataConfig(**options), **own)}")
    elif command == "sample":
        from complexity_dit.sample import SampleConfig, sample

        own = {k: options.pop(k) for k in ("pipeline", "out", "num_images", "labels", "overwrite")}
        sample(**own, sampling=SampleConfig(**options))
    elif command == "evaluate":
        from complexity_dit.evaluate import EvalConfig, evaluate

        own = {k: options.pop(k) for k in ("target", "reference", "out", "sample", "data")}
        evaluate(**own, config=EvalConfig(**options))
    elif command == "compare":
        from complexity_dit.compare import compare

        print(compare(options["first"], options["second"], options["allow"]))
    elif command == "inspect":
        import yaml

        from complexity_dit.inspect_model import inspect

        print(yaml.safe_dump(inspect(options["path"]), sort_keys=False), end="")
    elif command == "convert":
        from complexity_dit.convert import convert

        print(convert(options["checkpoint"], options["out"]).summary())
    elif command == "plan":
        from complexity_dit.config import TrainConfig
        from complexity_dit.plan import PlanConfig, plan

        options.pop("config")
        own = {field.name: options.pop(field.name) for field in fields(PlanConfig)}
        print(plan(TrainConfig(**options), PlanConfig(**own)))
    elif command == "app":
        from complexity_dit.app import serve
        from complexity_dit.app_config import AppConfig

        serve(options.pop("pipeline"), AppConfig(**options))


def _join_labels(arguments: Sequence[str]) -> list[str]:
    """Turn `--labels.style Cubism Fauvism` into `--labels.style=["Cubism","Fauvism"]`.

    The fields of `--labels` are known only to the pipeline, so the parser cannot declare them as
    options that take several values.
    """
    joined: list[str] = []
    i = 0
    while i < len(arguments):
        name, equals, value = arguments[i].partition("=")
        i += 1
        if not name.startswith("--labels."):
            joined.append(arguments[i - 1])
            continue
        values = [value] if equals else []
        while not equals and i < len(arguments) and not arguments[i].startswith("--"):
            values.append(arguments[i])
            i += 1
        joined.append(f"{name}={json.dumps(values)}")
    return joined


def main() -> None:
    """Run a command and turn what ends it into a message and an exit status.

    Wrong input is 2; a training that a signal stopped after saving is 128 + the signal, as in a
    shell; an interrupted command is 130. Only defects of ours end with a traceback.
    """
    if sys.argv[1:] == ["--version"]:  # asked by scripts: the parser would import everything first
        print(f"complexity-dit {__version__}")
        return
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for chatty in ("httpx", "datasets", "fsspec", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        run(sys.argv[1:])
    except UserError as error:
        sys.exit(_fail(f"complexity-dit: error: {error}", 2))
    except RunStopped as stop:
        sys.exit(_fail(f"complexity-dit: {stop}", stop.exit_status))
    except KeyboardInterrupt:
        sys.exit(_fail("complexity-dit: interrupted; checkpoints already written are whole", 130))


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
