"""Small language models and runs shared by the tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from complexity_lm import DeepConfig, DeepForCausalLM
from complexity_lm.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)
from complexity_lm.train import train

datasets.disable_progress_bars()

VOCABULARY = 64
RUN_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "dynamics_controller_hidden": 8,
}  # fmt: skip


def tiny_config(**overrides) -> DeepConfig:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "pad_token_id": 0,
        "dynamics_adaptive": "token", "dynamics_controller_hidden": 8,
    }  # fmt: skip
    return DeepConfig(**(sizes | overrides))


def lively_model(attn_implementation: str = "sdpa", **overrides) -> DeepForCausalLM:
    """A model in eval mode whose weights all affect the logits: no zero hides an error."""
    config = tiny_config(**overrides)
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeepForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.25 if parameter.ndim > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))
    return model


def word_tokenizer(*words: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; the first one stands for unknown words."""
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture
def words() -> Callable[..., PreTrainedTokenizerFast]:
    """Create a tokenizer of whole words."""
    return word_tokenizer


@pytest.fixture
def tiny() -> Callable[..., DeepConfig]:
    """Create a configuration with three layers of width 32 and 64 ids."""
    return tiny_config


@pytest.fixture
def lively() -> Callable[..., DeepForCausalLM]:
    """Create a model of that size whose weights all affect the logits."""
    return lively_model


@pytest.fixture
def fit() -> Callable[..., list[float]]:
    """Train a model on one batch with AdamW; returns the losses."""

    def run(model: torch.nn.Module, ids: torch.Tensor, steps: int, lr: float) -> list[float]:
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=lr)
        losses = []
        for _ in range(steps):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return run


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids (3, 11), none of them the padding id 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCABULARY, (3, 11), generator=generator)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of forty texts made of thirty random words, some of them not ASCII."""
    folder = tmp_path_factory.mktemp("texts")
    draw = np.random.default_rng(0)
    syllables = ["ka", "lo", "mi", "ne", "ru", "so", "tä", "vi"]
    words = ["".join(draw.choice(syllables, draw.integers(1, 4))) for _ in range(30)]
    chances = 1 / np.arange(1, 31)
    for i in range(40):
        text = draw.choice(words, 160, p=chances / chances.sum())
        lines = [" ".join(text[j : j + 8]).capitalize() + ".\n" for j in range(0, 160, 8)]
        (folder / f"{i:02}.txt").write_text("".join(lines))
    return folder


def run_config(out: Path, texts: Path, **fields) -> TrainConfig:
    return TrainConfig(
        mixed_precision="no",
        out=str(out),
        report_to="none",
        data=DataConfig(source=f"text:{texts}", context=24),
        tokenizer=TokenizerConfig(vocab_size=300),
        model=ModelConfig(overrides=dict(RUN_SIZES)),
        optim=OptimConfig(warmup_steps=2, lr=1e-2),
        **fields,
    )


@pytest.fixture
def small_run(tmp_path, texts) -> TrainConfig:
    """A run of a few seconds on those texts."""
    return run_config(
        tmp_path / "run", texts, steps=8, batch_size=4, log_every=3, eval_every=4, eval_blocks=4,
        checkpoint_every=4, dynamics_every=4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory, texts) -> Path:
    """The folder of a finished run of 30 steps, with a context of 24."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(run_config(out, texts, steps=30, batch_size=8, eval_every=0))
    return out
