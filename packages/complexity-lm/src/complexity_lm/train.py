"""Training: from text to tokenizer, blocks, model, a model folder and its measurements."""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from complexity_lm.adapters import add_adapter, is_adapter
from complexity_lm.config import RUN_KIND, TrainConfig
from complexity_lm.configuration_complexity import DeepConfig
from complexity_lm.conversations import (
    IGNORED,
    encode_conversations,
    pack_conversations,
    use_template,
)
from complexity_lm.data import (
    BlockStream,
    Corpus,
    collate,
    count_tokens,
    fingerprint,
    load_corpus,
    pack,
    token_bytes,
    tokenize,
    written_texts,
)
from complexity_lm.hub import report_errors
from complexity_lm.loading import find_model, load, versions, weights_hash
from complexity_lm.modeling_complexity import DeepForCausalLM
from complexity_lm.scoring import score_conversations, score_report, score_texts
from complexity_lm.sources import PACKING
from complexity_lm.tokenizer import (
    check_tokenizer,
    load_tokenizer,
    separator_id,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from complexity_lm.trainer import (
    RECORD_FILE,
    STATE_FILE,
    DynamicsMonitor,
    LMTrainer,
    check_batch,
    compile_layers,
    training_arguments,
)
from inl_core.run import workers
from inl_core.run.automatic import (
    AUTO,
    choose_compile,
    choose_precision,
    kept,
    kept_settings,
    settled,
    warn_without_units,
)
from inl_core.run.checkpoints import folder_of_step, open_run_folder, step_of
from inl_core.run.csv_log import read_columns
from inl_core.run.errors import RunStopped, UserError
from inl_core.run.files import atomic_file, atomic_folder
from inl_core.run.hub import check_login, upload
from inl_core.run.json_files import read_json_object
from inl_core.run.launcher import check_compiler, check_launcher, check_whole_checkpoints
from inl_core.run.ownership import check_data, history_comment, table_of_owners, take_settings
from inl_core.run.settings import dump_settings, nearest, read_settings
from inl_core.run.workers import report_dead_workers

logger = logging.getLogger(__name__)

OWNERS = table_of_owners(
    taken="""
        steps gradient_accumulation_steps compile gradient_checkpointing loop_sampling
        optim.lr optim.beta1 optim.beta2 optim.weight_decay optim.warmup_steps optim.schedule
        optim.schedule_options optim.grad_clip lora.dropout
    """,
    fixed="""
        seed batch_size mixed_precision
        data.holdout data.format data.messages_column data.context data.separate_documents
        data.piece_bytes data.document_separator data.files data.text_column data.hub_subset
        data.hub_split data.heldout_documents data.sample_documents tokenizer.vocab_size
        model.preset model.dynamics_placement model.dynamics_adaptive model.num_experts
        model.routing_scheme model.num_loops model.overrides model.dtype
        lora.rank lora.alpha lora.targets
    """,
    free="""
        out resume init_from log_every eval_every eval_blocks checkpoint_every keep_last keep_best
        dynamics_every report_to push_to_hub peak_tflops
        data.source data.heldout_source tokenizer.path
    """,
)
"""Who decides a setting of a resumed run, see `inl_core.run.ownership`.

Paths of text and tokenizer are free, because folders move: what they hold is compared.
"""

FORMER = {"mixed_precision": "no", "compile": False}
"""What may be `auto`, with the defaults of versions that had no `auto`."""

_PROBE_BLOCKS = 4


def train(config: TrainConfig, build: Callable[..., PreTrainedModel] | None = None) -> Path:
    """Run a training, or continue it.

    Writes into `out`: `config.yaml`, `tokenizer/`, `train_log.csv` (one row per step),
    `heldout_log.csv`, `dynamics.csv` (one row per layer and record), `logs/` (tensorboard),
    `checkpoints/step-XXXXXXXX/`, and at the end `model/` (a transformers folder with the
    tokenizer), `loss.png` and `result.json`. With `config.lora` it is `adapter/` instead.

    Args:
        config: The run.
        build: Creates the network from (config, tokenizer, tokens) where `init_from` names none;
            `build_model` by default. Any causal language model that transformers' Auto classes know
            can be trained this way.

    Returns:
        The folder of the finished model.

    Raises:
        UserError: The input is invalid, another run writes into the folder, the checkpoint is
            damaged, a loss is not finite, the disk is full, or a process of the run died.
        RunStopped: After SIGTERM or SIGINT, once the current step is finished and saved.
    """
    check_launcher(config.mixed_precision, config.gradient_accumulation_steps, ["bf16"])
    check_whole_checkpoints()
    if config.compile is True:
        check_compiler()
    processes = PartialState(cpu=not torch.accelerator.is_available())

    def on_main(work: Callable[[], Path | None]) -> Path | None:
        count, group = processes.num_processes, workers.message_group()
        return workers.on_main(work, processes.is_main_process, count, group)

    try:
        with (
            report_dead_workers(),
            open_run_folder(
                Path(config.out), config.resume, STATE_FILE, RUN_KIND, on_main
            ) as checkpoint,
        ):
            return _train(config, build or build_model, processes, checkpoint, on_main)
    finally:
        processes.destroy_process_group()  # nothing may wait after it


def _train(
    config: TrainConfig,
    build: Callable[..., PreTrainedModel],
    processes: PartialState,
    checkpoint: Path | None,
    on_main: Callable[[Callable[[], Any]], Any],
) -> Path:
    out, context = Path(config.out), config.data.context
    start_step = step_of(checkpoint) if checkpoint else 0
    has_heldout = bool(config.data.heldout_source or config.data.holdout)
    check_batch(config, processes.num_processes)
    if config.push_to_hub:
        on_main(lambda: check_login(str(config.push_to_hub)))
    if config.keep_best and not has_heldout:
        raise UserError("keep_best needs held-out text: set data.holdout or data.heldout_source")
    record: dict[str, Any] = {"settings": dataclasses.asdict(config), "changes": []}
    earlier = _read_record(checkpoint) if checkpoint else {}
    saved: dict[str, Any] = {}
    packing = earlier.get("packing", 1) if checkpoint else PACKING
    if packing not in range(1, PACKING + 1):
        raise UserError(f"{checkpoint} has packing {packing!r}: resume it with a newer version")
    record["packing"] = packing
    if checkpoint is not None:
        now = record["settings"]
        if config.tokenizer.path is None:  # the run keeps the tokenizer that it started with
            now["tokenizer"]["path"] = earlier["settings"].get("tokenizer", {}).get("path")
        if not config.lora.rank:  # the network is that of the checkpoint
            now["init_from"] = earlier["settings"].get("init_from")
        saved = kept(earlier["settings"], earlier.get("resolved", {}), FORMER)
        now = kept_settings(now, saved)
        changes = take_settings(OWNERS, saved, now, checkpoint, start_step)
        record["changes"] = [*earlier.get("changes", []), *changes]
        if best := earlier.get("best"):
            if folder_of_step(out / "checkpoints", best["step"]).is_dir():
                record["best"] = best
            else:
                logger.warning("the best checkpoint, of step %d, is gone", best["step"])
    corpus = load_corpus(config.data, packing)
    record["data"] = _identity(corpus)
    if checkpoint is not None:
        otherwise = "start a new run in another --out"
        check_data(earlier.get("data"), record["data"], checkpoint, otherwise)
    with processes.main_process_first():  # it trains the tokenizer, the others read it
        tokenizer = _tokenizer(config, corpus, out)
    is_chat = config.data.format == "chat"

    def encode(documents: datasets.Dataset, side: str) -> datasets.Dataset:
        if is_chat:
            return encode_conversations(documents, tokenizer, context, side)
        return tokenize(documents, tokenizer, packing)

    def packed(tokens: datasets.Dataset, side: str) -> datasets.Dataset:
        if is_chat:
            return pack_conversations(tokens, context, tokenizer)
        return pack(tokens, context, side)

    tokens = encode(corpus.sample, "training")
    heldout = None if corpus.heldout is None else encode(corpus.heldout, "held-out")
    if record["settings"]["init_from"] is None:
        model = build(config, tokenizer, tokens)
    else:
        model, record["base_sha256"] = _pretrained(config, checkpoint, earlier)
    record["resolved"] = _resolved(config, saved, model, processes, on_main)
    config = dataclasses.replace(config, **record["resolved"])
    by_layer = config.compile is True and getattr(model.config, "loop_start", None) is not None
    args = training_arguments(
        dataclasses.replace(config, compile=False) if by_layer else config,
        processes.num_processes, has_heldout, corpus.streamed,
    )  # fmt: skip
    if by_layer:
        compile_layers(model)
    assert args.world_size == processes.num_processes  # or the batch size would be another
    tokenizer.model_max_length = model.config.max_position_embeddings
    if corpus.streamed:
        train_tokens = tokenize(corpus.train, tokenizer, packing)
        blocks = BlockStream(pack(train_tokens, context), config.batch_size)
    else:
        blocks = packed(tokens, "training")
    heldout_blocks, bytes_per_token = None, math.nan
    if heldout is not None and corpus.heldout is not None:
        heldout_blocks = packed(heldout, "held-out")
        heldout_blocks = heldout_blocks.take(min(config.eval_blocks, len(heldout_blocks)))
        if is_chat:
            answers = np.sum(np.asarray(heldout_blocks["labels"]) != IGNORED)
            bytes_per_token = float(sum(heldout_blocks["bytes"]) / answers)
        else:
            # The first token of a block is not predicted.
            sizes = token_bytes(corpus.heldout, tokenizer, len(heldout_blocks) * context, packing)
            bytes_per_token = sizes.reshape(-1, context)[:, 1:].mean().item()

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "logs")
    trainer = LMTrainer(
        config, model, args, tokenizer, blocks, heldout_blocks, bytes_per_token, start_step,
        record,
    )  # fmt: skip
    if config.dynamics_every:
        source = packed(tokens, "training") if heldout_blocks is None else heldout_blocks
        probe = collate([source[i] for i in range(min(_PROBE_BLOCKS, len(source)))])["input_ids"]
        trainer.add_callback(DynamicsMonitor(trainer, probe))
    if processes.is_main_process:
        with atomic_file(out / "config.yaml") as partial:
            comment = history_comment(record["changes"])
            partial.write_text(comment + dump_settings(record["settings"]))
    with trainer.stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if trainer.stopped_by and step < config.steps:
        raise RunStopped(
            trainer.stopped_by,
            f"after step {step} of {config.steps}, which is saved in "
            f"{folder_of_step(out / 'checkpoints', step)}; resume with --resume auto",
        )

    folder = out / ("adapter" if config.lora.rank else "model")
    step = trainer.save_final(folder)
    if processes.is_main_process:
        plot_loss(out / "train_log.csv", out / "heldout_log.csv", out / "loss.png")
        _write_result(config, folder, corpus, record, step)
        if config.push_to_hub:
            url = upload(folder, f"Upload {folder.name} of step {step}", config.push_to_hub)
            logger.info("uploaded to %s", url)
    processes.wait_for_everyone()
    return folder


def _resolved(
    config: TrainConfig,
    saved: dict[str, Any],
    model: PreTrainedModel,
    processes: PartialState,
    on_main: Callable[[Callable[[], Any]], Any],
) -> dict[str, Any]:
    """Precision and compilation: as set, as in the run that is resumed, or what suits the run."""
    device: torch.device = processes.device  # pyright: ignore[reportAssignmentType]
    precision, compiled = config.mixed_precision, config.compile
    if precision == AUTO:
        precision = saved.get("mixed_precision") or on_main(
            lambda: settled("mixed_precision", choose_precision(device))
        )
        check_launcher(precision, config.gradient_accumulation_steps)
    if compiled == AUTO:
        tokens = config.steps * config.batch_size * config.data.context / processes.num_processes
        flops = 6 * tokens * sum(p.numel() for p in model.parameters())
        if not saved:
            compiled = on_main(lambda: settled("compile", choose_compile(flops, device)))
        elif compiled := saved["compile"]:
            check_compiler()
    if processes.is_main_process:
        warn_without_units(precision, device)
    return {"mixed_precision": precision, "compile": compiled}


def _read_record(checkpoint: Path) -> dict[str, Any]:
    """`run.json` of a checkpoint; of an older version the settings in the run's `config.yaml`."""
    with report_errors(f"cannot read checkpoint {checkpoint}"):
        if (checkpoint / RECORD_FILE).exists():
            record = read_json_object(checkpoint / RECORD_FILE, follow_links=False)
            if not isinstance(record["settings"], dict):
                raise ValueError(f"{RECORD_FILE} has no settings")
            return record
        config = checkpoint.resolve().parents[1] / "config.yaml"
        if not config.exists():
            return {"settings": {}}
        settings, written = dataclasses.asdict(TrainConfig()), read_settings(config)
        for name, value in settings.items():
            if isinstance(value, dict):
                value.update(written.get(name) or {})
            else:
                settings[name] = written.get(name, value)
        return {"settings": settings}


def _identity(corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint records of the text, to know it again; of a stream the first documents."""
    sides = {"training": corpus.sample, "held-out": corpus.heldout}
    return {
        f"{what} of the {side} text": value
        for side, text in sides.items()
        if text is not None
        for what, value in (
            ("fingerprint", fingerprint(text["text"])), ("number of documents", len(text)),
        )
    }  # fmt: skip


def build_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, tokens: datasets.Dataset
) -> DeepForCausalLM:
    """Create the network of a run, with the vocabulary of its tokenizer.

    The seed of the run determines the weights; balanced routing counts the tokenised training text.

    Raises:
        UserError: The settings are not those of a model, or the vocabulary is smaller than the
            tokenizer.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocabulary_size(tokenizer),
        "max_position_embeddings": config.data.context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": separator_id(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "dynamics_placement": config.model.dynamics_placement,
        "dynamics_adaptive": config.model.dynamics_adaptive,
        "num_experts": config.model.num_experts,
        "num_loops": config.model.num_loops,
    }
    for name in config.model.overrides:
        known = list(DeepConfig.__dataclass_fields__)
        if name not in known:
            raise UserError(f"model.overrides has no field {name!r}{nearest(name, known)}")
    torch.manual_seed(config.seed)
    kinds = (TypeError, ValueError, StrictDataclassError)
    with report_errors("cannot build this model", kinds=kinds):
        overrides = settings | config.model.overrides
        model_config = DeepConfig.from_preset(config.model.preset, **overrides)
        model = DeepForCausalLM(model_config)
    check_tokenizer(tokenizer, model_config, trained_with=None)
    _check_context(config, model)
    if model_config.num_experts and config.model.routing_scheme == "balanced":
        model.balance_experts(count_tokens(tokens, model_config.vocab_size))
    return model.to(getattr(torch, config.model.dtype))


def _pretrained(
    config: TrainConfig, checkpoint: Path | None, earlier: dict[str, Any]
) -> tuple[PreTrainedModel, str | None]:
    """The network of `init_from`, or of the checkpoint of a resumed run; and its hash.

    If an adapter is trained, it is added to the network of `init_from`, which has to be the same
    one when the run is resumed.
    """
    with_adapter = config.lora.rank > 0
    source = str(config.init_from if checkpoint is None or with_adapter else checkpoint)
    folder = _full_model(source)
    loaded = load(source, tokenizer=str(Path(config.out) / "tokenizer"), device="cpu")
    model = loaded.model.to(getattr(torch, config.model.dtype))  # pyright: ignore[reportArgumentType]
    _check_context(config, model)
    if checkpoint is not None and not with_adapter:
        return model, earlier.get("base_sha256")
    base = weights_hash(model)
    if checkpoint is not None and base != earlier.get("base_sha256"):
        raise UserError(
            f"--init_from {source} has other weights than the base of {checkpoint}: give the model "
            "that the run started with"
        )
    if with_adapter:
        name = str(folder.resolve()) if Path(source).expanduser().is_dir() else source
        add_adapter(model, name, config.lora, config.seed)
    logger.info("started from the weights of %s", source)
    return model, base


def _full_model(source: str) -> Path:
    folder = find_model(source)
    if is_adapter(folder):
        raise UserError(
            f"--init_from {source} is an adapter: merge it into its model first (peft's "
            "merge_and_unload), and save that"
        )
    return folder


def _check_context(config: TrainConfig, model: PreTrainedModel) -> None:
    longest = model.config.max_position_embeddings
    if config.data.context > longest:
        raise UserError(
            f"data.context is {config.data.context}, but the model is made for {longest} tokens "
            "(max_position_embeddings)"
        )


def _tokenizer(config: TrainConfig, corpus: Corpus, out: Path) -> PreTrainedTokenizerFast:
    """Return the run's tokenizer, saved once so that a resumed run does not train another."""
    folder = out / "tokenizer"
    given = load_tokenizer(config.tokenizer.path) if config.tokenizer.path else None
    if not folder.is_dir():
        if given is None and config.init_from is not None:
            new = load_tokenizer(_full_model(config.init_from))
        else:
            written = written_texts(corpus.sample["text"], config.data)
            new = given or train_tokenizer(written, config.tokenizer.vocab_size)
        if config.data.format == "chat":
            use_template(new)
        with atomic_folder(folder) as partial:
            new.save_pretrained(partial)
    tokenizer = load_tokenizer(folder)
    if given is not None and tokenizer_hash(given) != tokenizer_hash(tokenizer):
        raise UserError(
            f"{config.tokenizer.path} is not the tokenizer that this run started with ({folder}); "
            "leave tokenizer.path as it was, or choose another --out"
        )
    return tokenizer


def _write_result(
    config: TrainConfig, folder: Path, corpus: Corpus, record: dict[str, Any], step: int
) -> None:
    """Measure the saved model, rather than the one in memory, on all held-out text."""
    losses = _read_columns(Path(config.out) / "train_log.csv", "loss")[1].tolist()
    last = losses[-max(1, len(losses) // 50) :]
    result: dict[str, Any] = {"metrics": {}}
    loaded = load(str(folder))
    if corpus.heldout is not None:
        texts = list(corpus.heldout["text"])
        score_all = score_conversations if config.data.format == "chat" else score_texts
        score = score_all(loaded.model, loaded.tokenizer, texts, config.data.context)
        result = score_report(score, texts)
    result["metrics"]["train_loss"] = sum(last) / len(last)
    result |= {
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "step": step,
        "tokens_trained": step * config.batch_size * config.data.context,
        "settings": record["settings"],
        "resolved": record["resolved"],
        "changed_settings": record["changes"],
        "versions": versions(),
        "weights_sha256": weights_hash(loaded.model),
    }
    with atomic_file(Path(config.out) / "result.json") as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")


def plot_loss(log: Path, heldout_log: Path, target: Path) -> None:
    """Plot the training loss with its running mean, and the held-out loss if there is any."""
    steps, losses = _read_columns(log, "loss")
    window = max(1, len(steps) // 50)
    mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], mean, color="C0", label=f"mean of {window} steps")
    heldout_steps, heldout = _read_columns(heldout_log, "loss")
    if len(heldout):
        axes.plot(heldout_steps, heldout, "o-", color="C1", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="nats per token", ylim=(0.9 * min([*mean, *heldout]), None))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(target) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _read_columns(path: Path, value: str) -> tuple[np.ndarray, np.ndarray]:
    """The step column of a CSV log, and another one."""
    steps, values = read_columns(path, "step", value)
    return np.array(steps, int), np.array(values)
