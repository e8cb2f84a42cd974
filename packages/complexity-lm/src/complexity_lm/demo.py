"""The demo: train on the standard library's source, generate Python, compare with gzip."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from complexity_lm.config import (
    RUN_KIND,
    DataConfig,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)
from complexity_lm.data import load_split
from complexity_lm.evaluate import baselines, table
from complexity_lm.generate import generate
from complexity_lm.loading import Loaded, load
from complexity_lm.train import train
from complexity_lm.trainer import STATE_FILE
from inl_core.run.checkpoints import claim_run
from inl_core.run.files import atomic_file
from inl_core.run.json_files import read_json_object

LINES = 30
"""Lines in `samples.txt`."""

PROMPTS = ('"""', "class ", "def ", "import ", "    def __init__(self, ", "if __name__ == ")
"""Beginnings of the samples, in turn."""


def demo_config(out: str) -> TrainConfig:
    """The demo's run: 1.0 million parameters, 1.8 million tokens; also configs/lm/demo.yaml."""
    return TrainConfig(
        out=out,
        resume="auto",
        steps=900,
        batch_size=8,
        eval_every=300,
        eval_blocks=64,
        checkpoint_every=300,
        dynamics_every=100,
        data=DataConfig(source="stdlib", context=256),
        tokenizer=TokenizerConfig(vocab_size=2048),
        model=ModelConfig(
            preset="15m",
            overrides={
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        ),
        optim=OptimConfig(lr=4e-3, warmup_steps=50, schedule="cosine"),
    )


def demo(out: str) -> None:
    """Train, generate and measure; a second call continues an interrupted run.

    Writes the files of `train`, `samples.txt`, and the baselines into `result.json`.

    Args:
        out: Folder of the demo.
    """
    folder = Path(out)
    with claim_run(folder, STATE_FILE, RUN_KIND):
        _demo(folder)


def _demo(folder: Path) -> None:
    start = time.perf_counter()
    config = demo_config(str(folder))
    model = train(config)
    loaded = load(str(model))
    samples = sample_lines(loaded)
    with atomic_file(folder / "samples.txt") as partial:
        partial.write_text(samples)

    result = read_json_object(folder / "result.json")
    result["metrics"] |= baselines(loaded, list(load_split(config.data, "heldout")["text"]))
    with atomic_file(folder / "result.json") as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"""{samples}
Held-out files of the standard library:
{table(result)}

The demo took {(time.perf_counter() - start) / 60:.1f} minutes. In {folder}:
  samples.txt    the lines above
  loss.png       training and held-out loss
  result.json    the numbers above and every setting they depend on
  model/         the model and its tokenizer; load it in any process with
                 AutoModelForCausalLM.from_pretrained("{model}", trust_remote_code=True)

Next:
  complexity-lm generate {model} --prompt "def parse(" --do_sample true --temperature 0.8
  complexity-lm evaluate {model} --source stdlib --baselines true
  complexity-lm train --config configs/lm/tinyshakespeare.yaml --data.source text:PATH"""
    )


def sample_lines(
    loaded: Loaded, prompts: Sequence[str] = PROMPTS, new_tokens: int | None = None
) -> str:
    """Sample `LINES` lines of text with the prompts in turn and a comment before each sample.

    Every sample has its number as seed, and up to `new_tokens` tokens, `DEFAULT_NEW_TOKENS` for
    None.
    """
    options = {
        "do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": new_tokens
    }  # fmt: skip
    count, lines = 0, []
    for seed in range(LINES):
        prompt = prompts[seed % len(prompts)]
        (text,) = next(generate(loaded, [prompt], options, GenerateConfig(seed=seed)))
        # Without trailing blank lines, and no more than are still needed.
        new = text.rstrip().splitlines()[: LINES - count]
        count += len(new)
        lines += [f"# --- sample {seed + 1}", *new]
        if count == LINES:
            break
    return "\n".join(lines) + "\n"
