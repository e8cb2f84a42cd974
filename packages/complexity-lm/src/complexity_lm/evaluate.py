"""The evaluation: loss, perplexity and bits per byte of a text, baselines, lm-eval tasks."""

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from complexity_lm.baselines import ORDER, ByteModel, gzip_bits_per_byte
from complexity_lm.data import DataConfig, Split, load_split
from complexity_lm.harness import run_tasks
from complexity_lm.loading import Loaded, load, versions, weights_hash
from complexity_lm.scoring import score_report, score_texts
from inl_core.run.errors import UserError
from inl_core.run.files import file_aside

logger = logging.getLogger(__name__)


@dataclass
class EvalConfig:
    """What is measured, and how."""

    split: Literal["auto", "heldout", "train", "all"] = "auto"
    """Which documents; auto: the held-out ones of the source the model was trained on, all of any
    other source."""

    max_documents: int | None = None
    """At most so many documents, the first of them; null for all."""

    context: int | None = None
    """Tokens of a window; null for the model's own."""

    stride: int | None = None
    """Tokens scored by each window after a document's first; null for the context (blockwise); less
    gives each token a longer past and costs more."""

    batch_size: int = 16
    """Windows run at once."""

    baselines: bool = False
    """Also measure gzip -9 and an order-3 byte model (counted on the model's training text) on the
    same bytes."""

    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks by name, or paths of task files; needs the extra [eval]."""

    task_limit: int | None = None
    """Documents of each task; null for all."""

    tokenizer: str | None = None
    """Another folder or Hub id for the tokenizer; null for the model's own."""

    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1."""

    overwrite: bool = False
    """Replace a result.json that is already in the output folder."""

    quiet: bool = False
    """Print no table at the end."""


def evaluate(
    target: str | Loaded,
    source: str | None,
    out: str | Path | None = None,
    config: EvalConfig | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """Measure a model on a text, on lm-eval tasks, or both.

    Args:
        target: A model folder, a run's folder, a hub id, or a model that is loaded.
        source: stdlib, text:PATH or hub:NAME; None measures tasks only.
        out: Folder that gets ``result.json``; None writes nothing.
        config: What is measured.
        data: How the source is read; by default as in the training of the model, so that nothing it
            was trained on is held out. Its source is replaced by `source`.

    Returns:
        The result, as written: ``metrics`` (``loss`` in nats a token, ``perplexity``,
        ``bits_per_byte``, with baselines ``gzip_bits_per_byte`` and ``order3_bits_per_byte``),
        ``tasks``, ``n_documents``, ``n_tokens``, ``n_bytes``, ``text_fingerprint``, ``settings``,
        ``versions``, ``weights_sha256``.

    Raises:
        UserError: Nothing to measure, a result that exists, unreadable input, or a setting out of
            range.
    """
    config = config or EvalConfig()
    if source is None and not config.tasks:
        raise UserError("there is nothing to measure: give --source, --tasks, or both")
    if source is None and config.baselines:
        raise UserError("baselines need a text: give --source")
    result_path = Path(out) / "result.json" if out is not None else None
    if result_path and result_path.exists() and not config.overwrite:
        raise UserError(f"{result_path} exists; choose another folder or set --overwrite=true")
    for name in ("batch_size", "max_documents", "task_limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")

    loaded = load(target, config.tokenizer, config.device) if isinstance(target, str) else target
    context = loaded.context if config.context is None else config.context
    result: dict[str, Any] = {"metrics": {}}
    read: DataConfig | None = None
    if source is not None:
        read, split = _what_to_read(loaded, source, config, data)
        texts = list(load_split(read, split)["text"])[: config.max_documents]
        score = score_texts(
            loaded.model, loaded.tokenizer, texts, context, config.stride, config.batch_size
        )
        result = score_report(score, texts)
        if config.baselines:
            result["metrics"] |= _baselines(loaded, texts)
        config = replace(config, split=split, context=context, stride=config.stride or context)
    if config.tasks:
        result["tasks"] = run_tasks(
            loaded, config.tasks, config.batch_size, context, config.task_limit
        )
    result |= {
        "settings": {
            "model": loaded.name,
            "source": source,
            "eval": asdict(config),
            "data": asdict(read) if read else None,
            "device": loaded.model.device.type,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        },
        "versions": versions(),
        "weights_sha256": weights_hash(loaded.model),
    }
    if result_path:
        with file_aside(result_path) as aside:
            aside.write_text(json.dumps(result, indent=2, default=str) + "\n")
    if not config.quiet:
        print(table(result))
    return result


def _what_to_read(
    loaded: Loaded, source: str, config: EvalConfig, data: DataConfig | None
) -> tuple[DataConfig, Split]:
    trained = loaded.data
    same = trained is not None and trained.source == source
    read = data or trained or DataConfig()
    if not same and data is None:
        # A held-out source of the training says nothing about another source.
        read = replace(read, heldout_source=None)
    if config.split != "auto":
        return replace(read, source=source), config.split
    return replace(read, source=source), "heldout" if same else "all"


def _baselines(loaded: Loaded, texts: list[str]) -> dict[str, float]:
    found = {"gzip_bits_per_byte": gzip_bits_per_byte(texts)}
    if loaded.data is None:
        logger.warning(
            "%s does not say what it was trained on: no order-%d byte model", loaded.name, ORDER
        )
        return found
    model = ByteModel(load_split(loaded.data, "train")["text"])
    return found | {f"order{ORDER}_bits_per_byte": model.bits_per_byte(texts)}


def table(result: dict[str, Any]) -> str:
    """A result as lines to read."""
    metrics, lines = result["metrics"], []
    if "n_bytes" in result:
        lines.append(
            f"{result['n_documents']:,} documents, {result['n_bytes']:,} bytes, "
            f"{result['n_tokens']:,} tokens"
        )
    names = {
        "loss": "loss (nats a token)",
        "perplexity": "perplexity",
        "bits_per_byte": "bits per byte",
        "gzip_bits_per_byte": "  gzip -9",
        f"order{ORDER}_bits_per_byte": f"  order-{ORDER} byte model",
    }
    lines += [f"{title:24} {metrics[key]:.4f}" for key, title in names.items() if key in metrics]
    for task, values in result.get("tasks", {}).items():
        lines += [
            f"{task}  {key} {value:.4f}"
            for key, value in values.items()
            if isinstance(value, float)
        ]
    return "\n".join(lines)
