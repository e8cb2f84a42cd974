"""The commands of `complexity-dit`: what each is for, its options, and what it does with them.

Options and their help come from the dataclasses they fill. Imports are inside: a command costs what
it needs, and a page of help does not wait for diffusers.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from jsonargparse import ArgumentParser


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
    from complexity_dit.demo import demo

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
    from complexity_dit.config import DataConfig, SampleConfig
    from complexity_dit.evaluate import EvalConfig

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
    from complexity_dit.evaluate import EvalConfig, evaluate

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
    from complexity_dit.compare import compare

    print(compare(options["first"], options["second"], options["allow"]))


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=str, help="pipeline folder or Hub id, checkpoint, or run")


def _inspect(options: dict[str, Any]) -> None:
    import yaml

    from complexity_dit.inspect_model import inspect

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
    from complexity_dit.convert import convert

    print(convert(options["checkpoint"], options["out"]).summary())


def _app_options(parser: ArgumentParser) -> None:
    from complexity_dit.config import AppConfig

    parser.add_argument("pipeline", type=str, help="pipeline folder or Hub id")
    parser.add_class_arguments(AppConfig, None)


def _app(options: dict[str, Any]) -> None:
    from complexity_dit.app import serve
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
