"""Training: text to tokenizer, blocks, model, Trainer, a model folder and its numbers."""

import csv
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from complexity_lm.config import TrainConfig
from complexity_lm.configuration_complexity import DeepConfig
from complexity_lm.data import (
    BlockStream,
    Corpus,
    collate,
    count_tokens,
    load_corpus,
    pack,
    separator_id,
    tokenize,
)
from complexity_lm.loading import load, versions, weights_hash
from complexity_lm.modeling_complexity import DeepForCausalLM
from complexity_lm.scoring import score_report, score_texts
from complexity_lm.tokenizer import check_tokenizer, load_tokenizer, tokenizer_hash, train_tokenizer
from complexity_lm.trainer import DynamicsMonitor, LMTrainer, training_arguments
from inl_core.run.checkpoints import checkpoint_to_resume, lock_folder, step_of
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, atomic_folder, remove_partial_writes
from inl_core.run.workers import on_main, report_dead_workers

# The folder of a run: one run at a time writes in it, and where that run goes on from.

STATE_FILE = "trainer_state.json"
"""What Trainer writes into every checkpoint."""


@contextmanager
def open_run_folder(out: Path, resume: str, processes: PartialState) -> Iterator[Path | None]:
    """Hold a run's folder for this run, cleared of what a killed one left half-written.

    Args:
        out: The folder; made if it is not there.
        resume: auto, none, or a checkpoint folder.
        processes: Of the run; the main one holds the folder.

    Yields:
        The checkpoint to go on from, its checksums compared; None for a fresh start.

    Raises:
        UserError: Another run writes there, the folder is not free, there is no such checkpoint, or
            it is damaged.
    """
    with ExitStack() as held:

        def claim() -> Path | None:
            if resume not in ("auto", "none") and not (Path(resume) / STATE_FILE).is_file():
                raise UserError(
                    f"--resume {resume} is no checkpoint folder (no {STATE_FILE} in it)"
                )
            held.enter_context(lock_folder(out))
            for folder in (out, out / "checkpoints"):
                remove_partial_writes(folder)
            return checkpoint_to_resume(out, resume, STATE_FILE)

        yield on_main(claim, processes.is_main_process, processes.num_processes)


# Pictures of numbers: the loss curve.

matplotlib.use("Agg")  # no screen is needed or wanted


def plot_loss(log: Path, heldout: Path, target: Path) -> None:
    """Draw the training loss over steps with its running mean, and the held-out loss.

    Args:
        log: A run's `train_log.csv`.
        heldout: Its `heldout_log.csv`; may have no rows.
        target: The PNG to write (aside, then renamed).
    """
    steps, losses = _columns(log, "loss")
    window = max(1, len(steps) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
    at, held = _columns(heldout, "loss")
    if len(at):
        axes.plot(at, held, "o-", color="C1", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="nats a token", ylim=(0.9 * min([*smooth, *held]), None))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(target) as aside:
        figure.savefig(aside, format="png", dpi=120)
    plt.close(figure)


def _columns(path: Path, value: str) -> tuple[np.ndarray, np.ndarray]:
    with path.open(newline="") as file:
        rows = [(int(row["step"]), float(row[value])) for row in csv.DictReader(file)]
    steps, values = np.array(rows).reshape(-1, 2).T
    return steps, values


logger = logging.getLogger(__name__)

_PROBE_BLOCKS = 4


def train(config: TrainConfig, build: Callable[..., PreTrainedModel] | None = None) -> Path:
    """Run one training, or go on with it.

    Writes into `out`: `config.yaml`, `tokenizer/`, `train_log.csv` (a row a step),
    `heldout_log.csv`, `dynamics.csv` (a row a layer and look), `logs/` (tensorboard),
    `checkpoints/step-XXXXXXXX/`, and at the end `model/` (a transformers folder with its
    tokenizer), `loss.png` and `result.json`.

    Args:
        config: The whole run.
        build: Makes the network from (config, tokenizer, tokens); `build_model` by default. Another
            causal language model, known to transformers' Auto classes, trains in the same loop.

    Returns:
        The folder of the finished model.

    Raises:
        UserError: For bad input, a folder that another run writes in, a damaged checkpoint, a loss
            that is not finite, a disk that is full, or a process of the run that is gone.
    """
    processes = PartialState(cpu=not torch.accelerator.is_available())
    try:
        with (
            report_dead_workers(),
            open_run_folder(Path(config.out), config.resume, processes) as checkpoint,
        ):
            return _train(config, build or build_model, processes, checkpoint)
    finally:
        processes.destroy_process_group()  # nothing may wait after it


def _train(
    config: TrainConfig,
    build: Callable[..., PreTrainedModel],
    processes: PartialState,
    checkpoint: Path | None,
) -> Path:
    out = Path(config.out)
    start_step = step_of(checkpoint) if checkpoint else 0
    measures = bool(config.data.heldout_source or config.data.holdout)
    args = training_arguments(config, processes.num_processes, measures)
    assert args.world_size == processes.num_processes  # or the batch would be another one
    corpus = load_corpus(config.data)
    with processes.main_process_first():  # one trains the tokenizer, the others read it
        tokenizer = _tokenizer(config, corpus, out)
    tokens = tokenize(corpus.sample, tokenizer)
    heldout = tokenize(corpus.heldout, tokenizer) if corpus.heldout is not None else None
    model = build(config, tokenizer, tokens)
    blocks = _training_blocks(config, corpus, tokens, tokenizer)
    heldout_blocks = None
    if heldout is not None:
        heldout_blocks = pack(heldout, config.data.context, "held-out")
        heldout_blocks = heldout_blocks.take(min(config.eval_blocks, len(heldout_blocks)))

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "logs")
    trainer = LMTrainer(
        config, model, tokenizer, blocks, heldout_blocks,
        _bytes_per_token(corpus, heldout), start_step, args,
    )  # fmt: skip
    if config.dynamics_every:
        probe = pack(tokens, config.data.context) if heldout_blocks is None else heldout_blocks
        trainer.add_callback(_monitor(config, trainer, probe, start_step))
    if processes.is_main_process:
        with atomic_file(out / "config.yaml") as aside:
            aside.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    folder = trainer.save_final(out / "model")
    if processes.is_main_process:
        plot_loss(out / "train_log.csv", out / "heldout_log.csv", out / "loss.png")
        _write_result(config, folder, corpus)
    processes.wait_for_everyone()
    return folder


def build_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, tokens: datasets.Dataset
) -> DeepForCausalLM:
    """The network of a config, with its ids those of the tokenizer.

    Args:
        config: The run; its seed draws the weights.
        tokenizer: Gives the vocabulary and the special ids.
        tokens: Tokenised training text, which balanced routing counts.

    Raises:
        UserError: The settings do not make a model, or the vocabulary is smaller than the
            tokenizer.
    """
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.data.context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": separator_id(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "dynamics_placement": config.model.dynamics_placement,
        "dynamics_adaptive": config.model.dynamics_adaptive,
        "num_experts": config.model.num_experts,
    }
    torch.manual_seed(config.seed)
    try:
        made = DeepConfig.from_preset(config.model.preset, **(settings | config.model.overrides))
        model = DeepForCausalLM(made)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"this model cannot be built: {error}") from error
    check_tokenizer(tokenizer, made, trained_with=None)
    if config.data.context > made.max_position_embeddings:
        raise UserError(
            f"data.context is {config.data.context}, and the model is made for "
            f"{made.max_position_embeddings} tokens (max_position_embeddings)"
        )
    if made.num_experts and config.model.routing_scheme == "balanced":
        model.balance_experts(count_tokens(tokens, made.vocab_size))
    return model.to(getattr(torch, config.model.dtype))


def _tokenizer(config: TrainConfig, corpus: Corpus, out: Path) -> PreTrainedTokenizerFast:
    """The run's tokenizer, saved in its folder once: a resumed run must not train another."""
    folder = out / "tokenizer"
    given = load_tokenizer(config.tokenizer.path) if config.tokenizer.path else None
    if not folder.is_dir():
        made = given or train_tokenizer(corpus.sample["text"], config.tokenizer.vocab_size)
        with atomic_folder(folder) as aside:
            made.save_pretrained(aside)
    tokenizer = load_tokenizer(folder)
    if given is not None and tokenizer_hash(given) != tokenizer_hash(tokenizer):
        raise UserError(
            f"{config.tokenizer.path} is not the tokenizer that this run began with ({folder}); "
            "leave tokenizer.path as it was, or choose another --out"
        )
    return tokenizer


def _training_blocks(
    config: TrainConfig,
    corpus: Corpus,
    tokens: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
) -> datasets.Dataset | BlockStream:
    if not corpus.streamed:
        return pack(tokens, config.data.context, "training")
    blocks = pack(tokenize(corpus.train, tokenizer), config.data.context)
    return BlockStream(blocks, config.batch_size)


def _bytes_per_token(corpus: Corpus, heldout: datasets.Dataset | None) -> float:
    """Of the held-out text, separators counted as tokens: the blocks have them too."""
    if heldout is None or corpus.heldout is None:
        return math.nan
    size = sum(len(text.encode()) for text in corpus.heldout["text"])
    return size / sum(map(len, heldout["input_ids"]))


def _monitor(
    config: TrainConfig, trainer: LMTrainer, blocks: datasets.Dataset, start_step: int
) -> DynamicsMonitor:
    probe = collate([blocks[i] for i in range(min(_PROBE_BLOCKS, len(blocks)))])["input_ids"]
    return DynamicsMonitor(
        Path(config.out) / "dynamics.csv",
        probe,
        config.dynamics_every,
        start_step,
        trainer.log_to_tracker,
        lambda: trainer.accelerator.autocast(),
        trainer.is_world_process_zero(),
    )


def _write_result(config: TrainConfig, folder: Path, corpus: Corpus) -> None:
    """Measure the saved model, not the one in memory, on all held-out text."""
    with (Path(config.out) / "train_log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    last = losses[-max(1, len(losses) // 50) :]
    result: dict[str, Any] = {"metrics": {"train_loss": sum(last) / len(last)}}
    loaded = load(str(folder))
    if corpus.heldout is not None:
        texts = list(corpus.heldout["text"])
        score = score_texts(loaded.model, loaded.tokenizer, texts, config.data.context)
        result = score_report(score, texts)
        result["metrics"]["train_loss"] = sum(last) / len(last)
    result |= {
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "tokens_trained": config.steps * config.batch_size * config.data.context,
        "settings": dataclasses.asdict(config),
        "versions": versions(),
        "weights_sha256": weights_hash(loaded.model),
    }
    with atomic_file(Path(config.out) / "result.json") as aside:
        aside.write_text(json.dumps(result, indent=2) + "\n")
