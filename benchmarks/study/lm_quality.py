"""Held-out bits per byte of small language models with the paper's dynamics and without.

    python -m benchmarks.study.lm_quality PATH/tinyshakespeare.txt --rows benchmarks/results.csv
    python -m benchmarks.study.lm_quality PATH/wikitext2_valid.txt \
        --heldout PATH/wikitext2_test.txt --rows benchmarks/results.csv

Three runs from one seed, on the same blocks in the same order: the paper's dynamics, `branch` with
its controller ("default" in the rows, which it was); `none` with a wider MLP for equal parameters,
after as many steps; and `none` with the same MLP, after as many steps as take the same time. The
ratio of step times is measured first, steps of both in turn, so that a busy machine slows both
alike.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.common.memory import parameters
from benchmarks.common.results import append_rows, as_rows, format_values
from benchmarks.common.timing import paired, training_step
from transformers.utils import logging as transformers_logging

from complexity_lm import DeepConfig, DeepForCausalLM
from complexity_lm.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)
from complexity_lm.train import train

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VOCABULARY = 1024


def shape(wider):
    """The sizes, with an MLP that is `wider` units wider."""
    return SHAPE | {"intermediate_size": SHAPE["intermediate_size"] + wider}


def build(placement, wider=0):
    """A model as `complexity_lm.train` builds it."""
    config = DeepConfig.from_preset(
        "15m", vocab_size=VOCABULARY, dynamics_placement=placement, dynamics_adaptive="token",
        **shape(wider),
    )  # fmt: skip
    return DeepForCausalLM(config)


def width_for_equal_parameters():
    """Units that `none` needs in addition to have the parameters of `branch` within 0.5 %."""
    wanted, plain = parameters(build("branch")), parameters(build("none"))
    per_unit = parameters(build("none", wider=1)) - plain
    wider = round((wanted - plain) / per_unit)
    assert abs(plain + wider * per_unit - wanted) < 0.005 * wanted
    return wider


def step_of(model, batch_size, context):
    ids = torch.randint(VOCABULARY, (batch_size, context))
    return training_step(
        model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, clip=True
    )


def main():
    """Train and print the three runs; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--heldout", type=Path, help="by default a tenth of the text")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()

    size = options.batch_size, options.context
    steps = {name: step_of(build(name), *size) for name in ("none", "branch")}
    ratio = paired(steps, 15, "cpu")["branch"][1]
    print(f"a step with dynamics takes {ratio:.3f} times one without", flush=True)
    wider = width_for_equal_parameters()
    cases = {
        "default": ("branch", 0, options.steps),
        "none, equal parameters": ("none", wider, options.steps),
        "none, equal time": ("none", 0, round(options.steps * ratio)),
    }
    corpus = options.heldout.stem if options.heldout else options.text.stem
    data = DataConfig(
        source=f"text:{options.text}",
        heldout_source=f"text:{options.heldout}" if options.heldout else None,
        context=options.context,
        piece_bytes=4096,
    )
    rows = []
    for case, (placement, extra, count) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                out=f"{folder}/run", seed=options.seed, steps=count,
                batch_size=options.batch_size, eval_every=0, checkpoint_every=10**9,
                dynamics_every=0, report_to="none", mixed_precision="no", compile=False, data=data,
                tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
                model=ModelConfig(
                    dynamics_placement=placement, dynamics_adaptive="token", overrides=shape(extra)
                ),
                optim=replace(OptimConfig(), lr=options.lr),
            )  # fmt: skip
            start = time.perf_counter()
            train(config)
            seconds = time.perf_counter() - start
            result = json.loads((Path(config.out) / "result.json").read_text())
        values = {
            "bits_per_byte": (result["metrics"]["bits_per_byte"], "bits"),
            "parameters": (result["parameters"], ""),
            "steps": (count, ""),
            "whole run": (seconds, "s"),
        }
        print(f"{corpus} {case}: {format_values(values)}")
        about = f"{options.batch_size}x{options.context} seed {options.seed}"
        rows += as_rows(values, f"{corpus} {case}", shape=about)
    if options.rows:
        append_rows(options.rows, "lm_quality", rows, "cpu")


if __name__ == "__main__":
    main()
