"""The commands of `complexity-dit` as one table.

Options and their help come from the dataclasses in `config`, which load no torch. A command imports
the code that does its work when it runs, so that help pages stay fast.
"""

from dataclasses import replace
from typing import Any

import yaml

from complexity_dit.config import (
    AppConfig,
    AutoencoderConfig,
    DataConfig,
    EvalConfig,
    EvalSampleConfig,
    PlanConfig,
    SampleConfig,
    StartConfig,
    TrainConfig,
)
from inl_core.run.commands import Command, Option


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


def _autoencoder(config: AutoencoderConfig, source: str | None) -> None:
    from complexity_dit.training.autoencoder import train_autoencoder

    if source is not None:
        config = replace(config, data=replace(config.data, source=source))
    print(f"the autoencoder is in {train_autoencoder(config)}")


def _sample(config: SampleConfig, start: StartConfig, **options: Any) -> None:
    from complexity_dit.distributed import own_process_group
    from complexity_dit.pipelines.sampling import sample

    with own_process_group():
        sample(**options, sampling=config, start=start)


def _evaluate(config: EvalConfig, lengths: list[float], **options: Any) -> None:
    from complexity_dit.cli.average import evaluate_lengths
    from complexity_dit.distributed import own_process_group
    from complexity_dit.evaluation.evaluate import evaluate

    with own_process_group():
        if lengths:
            evaluate_lengths(**options, lengths=lengths, config=config)
        else:
            evaluate(**options, config=config)


def _average(**options: Any) -> None:
    from complexity_dit.cli.average import average

    average(**options)


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


_WHICH = "pipeline folder, checkpoint, folder of a run, name in checkpoints/, or Hub id"
_PIPELINE = {"pipeline": Option(_WHICH)}

COMMANDS = {
    "demo": Command(
        "Train on the embedded art set, sample and evaluate.",
        _demo,
        options={"out": Option("Folder of the demo.", "runs/demo")},
    ),
    "train": Command(
        "Train a model, or resume a run.", _train, configs=[TrainConfig], has_config=True
    ),
    "encode": Command(
        "Encode images into latents for training, with a VAE.",
        _encode,
        options={
            "out": Option("Folder of the latents."),
            "batch_size": Option("Images per call of the VAE.", 16, int),
            "part_size": Option("Images per file.", 512, int),
            "mixed_precision": Option("no, or bf16 for autocast.", "no"),
        },
        configs=[DataConfig],
        skip=frozenset({"clusters"}),
        defaults={"resolution": 128},
    ),
    "autoencoder": Command(
        "Train an autoencoder on pictures, or resume its training.",
        _autoencoder,
        options={"source": Option("Where the pictures come from: data.source.", None, str | None)},
        configs=[AutoencoderConfig],
        has_config=True,
    ),
    "sample": Command(
        "Sample images from a trained pipeline.",
        _sample,
        _PIPELINE,
        {
            "out": Option("FILE.png (grid), FILE.npz, or a folder of PNGs."),
            "num_images": Option("Number of images.", None, int | None),
            "labels": Option(
                "--labels.style NAME [NAME ...] for any label field; several alternate.",
                None,
                dict[str, list[str]] | None,
            ),
            "prompt": Option(
                "Text, for a pipeline with a text encoder. Labels that are not named are left out.",
                None,
                str | None,
            ),
            "prompts": Option("File with a prompt in each line.", None, str | None),
            "overwrite": Option("Replace what --out holds.", False, bool),
        },
        [SampleConfig, StartConfig],
    ),
    "evaluate": Command(
        "Measure FID, KID and more of a pipeline or of images.",
        _evaluate,
        {
            "target": Option(
                f"{_WHICH}; a folder of images, an .npz with arr_0, or a source (its training "
                "images)"
            )
        },
        {
            "reference": Option(
                "art | imagefolder:PATH | hub:NAME (their held-out images), a folder, or an .npz "
                "of images or statistics."
            ),
            "out": Option("For result.json and report.html.", "runs/evaluation"),
            "data": Option(
                "How the reference is read; by default as in the pipeline's training.",
                None,
                DataConfig | None,
            ),
            "lengths": Option(
                "Measure averages of these lengths of a run, each in OUT/length-L, and name the "
                "best (see average).",
                [],
                list[float],
            ),
        },
        [EvalConfig],
        {"sample": EvalSampleConfig},
    ),
    "compare": Command(
        "Compare two results that were measured with the same settings.",
        _compare,
        {"first": Option("a result.json, or its folder"), "second": Option("another")},
        {
            "allow": Option(
                "Settings that may differ, e.g. --allow [sample.guidance_scale].", [], list[str]
            )
        },
    ),
    "average": Command(
        "Average the weights of a run over a length chosen now, from its snapshots.",
        _average,
        {"run": Option("folder of a run with ema.snapshot_every")},
        {
            "length": Option(
                "Standard deviation of the average's profile, as a share of the training; by "
                "default the best of --result.",
                None,
                float | None,
            ),
            "result": Option(
                "Result of evaluate --lengths, for the best length and the model card.",
                None,
                str | None,
            ),
            "out": Option("Pipeline folder to write."),
        },
    ),
    "inspect": Command(
        "Describe a pipeline, a checkpoint or a run.",
        _inspect,
        {"path": Option(_WHICH)},
    ),
    "plan": Command(
        "Estimate the parameters, FLOPs, memory and steps of a run.",
        _plan,
        configs=[TrainConfig, PlanConfig],
        has_config=True,
    ),
    "convert": Command(
        "Convert a checkpoint of the authors' research code into a pipeline to train from.",
        _convert,
        {"checkpoint": Option("state dict of the research code, one safetensors file")},
        {"out": Option("Pipeline folder to write, for train --init_from.")},
    ),
    "app": Command(
        "Serve a page that samples images in the browser; needs the extra [app].",
        _app,
        _PIPELINE,
        configs=[AppConfig],
    ),
}
