"""The evaluation: loss, perplexity and bits per byte of a text, baselines, lm-eval tasks."""

import gzip
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from complexity_lm.data import DataConfig, Split, load_split
from complexity_lm.loading import Loaded, load, versions, weights_hash
from complexity_lm.scoring import score_report, score_texts
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file

# lm-eval tasks on a model of ours, through its `HFLM`.


def run_tasks(
    loaded: Loaded, tasks: list[str], batch_size: int, context: int, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval.

    Args:
        loaded: The model and its tokenizer.
        tasks: Names of lm-eval's own tasks, or paths of task files (YAML); the folder of a file is
            searched for what it includes.
        batch_size: Requests run at once.
        context: Longest window in tokens.
        limit: Documents of each task; None for all.

    Returns:
        For each task its metrics, as lm-eval names them without the filter ("bits_per_byte").

    Raises:
        UserError: lm-eval is not installed, or does not know a task.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval, which cannot be imported ({error}): "
            "pip install 'complexity-lm[eval]'"
        ) from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for path in files:
        if not path.is_file():
            raise UserError(f"--tasks {path}: there is no such file")
    manager = TaskManager(include_path=sorted({str(path.parent.resolve()) for path in files}))
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"lm-eval knows no task {', '.join(unknown)}; see `lm-eval ls tasks`, or give the path "
            "of a task file"
        )

    class RunningText(HFLM):
        """No second separator where lm-eval's rolling windows put one in front themselves."""

        def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
            before, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(*args, **kwargs)
            finally:
                self.add_bos_token = before

    model = RunningText(
        pretrained=loaded.model,  # pyright: ignore[reportArgumentType]
        tokenizer=loaded.tokenizer,  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        max_length=context,
    )
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, limit=limit)
    assert found is not None  # only helper processes of a distributed run get none
    return {
        task: {key.removesuffix(",none"): value for key, value in values.items()}
        for task, values in found["results"].items()
    }


def _task_name(path: Path) -> str:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no task file: {error}") from error
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{path} is no task file: it has no key `task`")
    return str(content["task"])


# Baselines: gzip, and an order-3 model of bytes. Both see the bytes of the same held-out documents
# as the model. gzip starts from nothing and adapts as it goes; the byte model is counted on the
# training bytes once and then stays as it is.

ORDER = 3
"""Bytes of context of the byte model."""


def gzip_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits a byte of `gzip -9` over the documents, one behind the other.

    Raises:
        UserError: There is no text.
    """
    whole = "".join(texts).encode()
    if not whole:
        raise UserError("there is no text to compress")
    return 8 * len(gzip.compress(whole, compresslevel=9, mtime=0)) / len(whole)


class ByteModel:
    """Interpolated n-gram model of bytes with Witten-Bell smoothing (Bell, Witten, Cleary 1989).

    With n(c·b) the count of byte b behind context c, n(c) that of c with any byte behind it, and
    t(c) the number of different bytes seen behind c,

        P_k(b | c) = (n(c·b) + t(c) P_{k-1}(b | c')) / (n(c) + t(c)),

    where c' is c without its oldest byte and P_{-1} = 1/256. A context that was never seen leaves
    P_{k-1}. Three zero bytes stand in front of each document.

    Args:
        texts: Training documents.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        keys = _keys(texts)
        self.tables = [_count(keys & (256 ** (order + 1) - 1)) for order in range(ORDER + 1)]

    def bits_per_byte(self, texts: Sequence[str]) -> float:
        """Bits a byte of other documents.

        Raises:
            UserError: There is no text.
        """
        keys = _keys(texts)
        if not len(keys):
            raise UserError("there is no text to predict")
        p = np.full(len(keys), 1 / 256)
        for order, (grams, gram_counts, contexts, totals, kinds) in enumerate(self.tables):
            gram = keys & (256 ** (order + 1) - 1)
            n = _look_up(grams, gram_counts, gram)
            total = _look_up(contexts, totals, gram >> 8)
            kind = _look_up(contexts, kinds, gram >> 8)
            seen = total > 0
            p[seen] = (n[seen] + kind[seen] * p[seen]) / (total[seen] + kind[seen])
        return float(-np.log2(p).sum() / len(keys))


_Table = tuple[
    NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]
]


def _keys(texts: Iterable[str]) -> NDArray[np.uint32]:
    """For each byte the number whose base-256 digits are its three predecessors and itself."""
    parts = [np.zeros(0, np.uint32)]
    for text in texts:
        padded = np.frombuffer(bytes(ORDER) + text.encode(), np.uint8).astype(np.uint32)
        length = len(padded) - ORDER
        parts.append(
            sum(
                (padded[i : i + length] << np.uint32(8 * (ORDER - i)) for i in range(ORDER + 1)),
                np.zeros(length, np.uint32),
            )
        )
    return np.concatenate(parts)


def _count(grams: NDArray[np.uint32]) -> _Table:
    """Distinct grams and their counts; their contexts, those' totals and numbers of followers."""
    unique, counts = np.unique(grams, return_counts=True)
    contexts, first, kinds = np.unique(
        unique >> np.uint32(8), return_index=True, return_counts=True
    )
    return (
        unique,
        counts,
        contexts,
        np.add.reduceat(counts, first) if len(counts) else counts,
        kinds,
    )


def _look_up(
    known: NDArray[np.uint32], values: NDArray[np.int64], wanted: NDArray[np.uint32]
) -> NDArray[np.int64]:
    """The value of each wanted key; 0 where it is unknown. `known` is sorted."""
    if not len(known):
        return np.zeros(len(wanted), np.int64)
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, values[place], 0)


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
        with atomic_file(result_path) as aside:
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
