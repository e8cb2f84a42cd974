"""Evaluation: loss, perplexity and bits per byte of a text, baselines, lm-eval tasks."""

import gzip
import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from complexity_lm.config import RUN_KIND, DataConfig, EvalConfig
from complexity_lm.conversations import use_template
from complexity_lm.data import load_split
from complexity_lm.loading import Loaded, load, repeating, versions, weights_hash
from complexity_lm.scoring import score_conversations, score_report, score_texts
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file
from inl_core.run.folders import claim_folder, has_result
from inl_core.run.settings import read_settings

logger = logging.getLogger(__name__)

ORDER = 3
"""Bytes of context of the byte model."""


def evaluate(
    target: str | Loaded,
    source: str | None,
    out: str | Path | None = None,
    config: EvalConfig | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """Measure a model on a text, on lm-eval tasks, or both.

    Args:
        target: A model folder, a run's folder, a Hub id, or a loaded model.
        source: stdlib, text:PATH or hub:NAME; None measures tasks only.
        out: Folder for ``result.json``; None writes nothing.
        config: What to measure.
        data: How the source is read; by default as in the training of the model, so that no
            document it was trained on is held out. Its source is replaced by `source`.

    Returns:
        The content of ``result.json``: ``metrics`` (``loss`` in nats per token, ``perplexity``,
        ``bits_per_byte``, with baselines ``gzip_bits_per_byte`` and ``order3_bits_per_byte``),
        ``tasks``, ``n_documents``, ``n_tokens``, ``n_bytes``, ``text_fingerprint``, ``settings``,
        ``versions``, ``weights_sha256``.

    Raises:
        UserError: There is nothing to measure, the result exists, the input is unreadable, or a
            setting is out of range.
    """
    config = config or EvalConfig()
    if source is None and not config.tasks:
        raise UserError("nothing to measure: give --source, --tasks, or both")
    if source is None and config.baselines:
        raise UserError("baselines need a text: give --source")
    result_path = Path(out) / "result.json" if out is not None else None
    if result_path and result_path.exists() and not config.overwrite:
        raise UserError(f"{result_path} exists; choose another folder or set --overwrite=true")

    with ExitStack() as held:
        if out is not None:
            kind, also = "complexity-lm-evaluation", (RUN_KIND,)
            held.enter_context(claim_folder(Path(out), kind, also, has_result))
        if isinstance(target, str):
            target = load(target, config.tokenizer, config.device)
        with repeating(target, config.num_loops):
            result = _measured(target, source, config, data)
        if result_path:
            with atomic_file(result_path) as partial:
                partial.write_text(json.dumps(result, indent=2, default=str) + "\n")
    if not config.quiet:
        print(table(result))
    return result


def _measured(
    loaded: Loaded, source: str | None, config: EvalConfig, data: DataConfig | None
) -> dict[str, Any]:
    context = loaded.context if config.context is None else config.context
    result: dict[str, Any] = {"metrics": {}}
    text_settings: DataConfig | None = None
    if source is not None:
        is_training_source = loaded.data is not None and loaded.data.source == source
        text_settings = replace(data or loaded.data or DataConfig(), source=source)
        if not is_training_source and data is None:
            # The held-out source of the training belongs to the training source only.
            text_settings = replace(text_settings, heldout_source=None)
        split = config.split
        if split == "auto":
            split = "heldout" if is_training_source else "all"
        texts = list(load_split(text_settings, split)["text"])[: config.max_documents]
        if text_settings.format == "chat":
            if config.stride or config.baselines:
                raise UserError("conversations are scored as wholes: leave stride and baselines")
            use_template(loaded.tokenizer)
            score = score_conversations(
                loaded.model, loaded.tokenizer, texts, context, config.batch_size
            )
        else:
            score = score_texts(
                loaded.model, loaded.tokenizer, texts, context, config.stride, config.batch_size
            )
        result = score_report(score, texts)
        if config.baselines:
            result["metrics"] |= baselines(loaded, texts)
        config = replace(config, split=split, context=context, stride=config.stride or context)
    if config.tasks:
        result["tasks"] = run_tasks(
            loaded, config.tasks, config.batch_size, context, config.task_limit
        )
    return result | {
        "settings": {
            "model": loaded.name,
            "source": source,
            "eval": asdict(config),
            "data": asdict(text_settings) if text_settings else None,
            "device": loaded.model.device.type,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        },
        "versions": versions(),
        "weights_sha256": weights_hash(loaded.model),
    }


def table(result: dict[str, Any]) -> str:
    """Format a result as lines of text."""
    metrics, lines = result["metrics"], []
    if "n_bytes" in result:
        lines.append(
            f"{result['n_documents']:,} documents, {result['n_bytes']:,} bytes, "
            f"{result['n_tokens']:,} tokens"
        )
    names = {
        "loss": "loss (nats per token)",
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


# Baselines: gzip, and an order-3 model of bytes. Both get the bytes of the same documents as the
# model. gzip starts empty and adapts as it goes; the byte model is counted once on the training
# text and then stays fixed.


def baselines(loaded: Loaded, texts: list[str]) -> dict[str, float]:
    """Metrics of the baselines on the documents that the model is measured on."""
    result = {"gzip_bits_per_byte": gzip_bits_per_byte(texts)}
    if loaded.data is None:
        logger.warning(
            "no order-%d byte model: the training text of %s is unknown", ORDER, loaded.name
        )
        return result
    model = ByteModel(load_split(loaded.data, "train")["text"])
    return result | {f"order{ORDER}_bits_per_byte": model.bits_per_byte(texts)}


def gzip_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits per byte of `gzip -9` over the concatenated documents.

    Raises:
        UserError: There is no text.
    """
    data = "".join(texts).encode()
    if not data:
        raise UserError("there is no text to compress")
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / len(data)


class ByteModel:
    """Interpolated n-gram model of bytes with Witten-Bell smoothing (Bell, Witten, Cleary 1989).

    With n(c·b) the count of byte b after context c, n(c) that of c followed by any byte, and t(c)
    the number of different bytes that occurred after c,

        P_k(b | c) = (n(c·b) + t(c) P_{k-1}(b | c')) / (n(c) + t(c)),

    where c' is c without its oldest byte and P_{-1} = 1/256. A context that did not occur keeps
    P_{k-1}. As many zero bytes as the longest context has precede each document.

    Args:
        texts: Documents to count.
        order: Bytes of the longest context, at most 7.
    """

    def __init__(self, texts: Iterable[str], order: int = ORDER) -> None:
        self.order = order
        keys = _keys(texts, order)
        self.tables = [_count(keys & (256 ** (length + 1) - 1)) for length in range(order + 1)]

    def bits_per_byte(self, texts: Sequence[str]) -> float:
        """Bits per byte of other documents.

        Raises:
            UserError: There is no text.
        """
        keys = _keys(texts, self.order)
        if not len(keys):
            raise UserError("there is no text to predict")
        p = np.full(len(keys), 1 / 256)
        for order, (grams, gram_counts, contexts, totals, kinds) in enumerate(self.tables):
            gram = keys & (256 ** (order + 1) - 1)
            n = _look_up(grams, gram_counts, gram)
            total = _look_up(contexts, totals, gram >> 8)
            kind = _look_up(contexts, kinds, gram >> 8)
            known = total > 0
            p[known] = (n[known] + kind[known] * p[known]) / (total[known] + kind[known])
        return float(-np.log2(p).sum() / len(keys))


def _keys(texts: Iterable[str], order: int) -> NDArray[np.unsignedinteger[Any]]:
    """For each byte the number whose base-256 digits are its `order` predecessors and itself."""
    number = np.uint32 if order < 4 else np.uint64
    parts = [np.zeros(0, number)]
    for text in texts:
        padded = np.frombuffer(bytes(order) + text.encode(), np.uint8).astype(number)
        keys = np.zeros(len(padded) - order, number)
        for i in range(order + 1):
            keys += padded[i : i + len(keys)] << number(8 * (order - i))
        parts.append(keys)
    return np.concatenate(parts)


def _count(grams: NDArray[np.unsignedinteger[Any]]) -> tuple[NDArray[Any], ...]:
    """Distinct grams and their counts; their contexts with totals and numbers of followers."""
    unique, counts = np.unique(grams, return_counts=True)
    contexts, first, kinds = np.unique(unique >> 8, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first) if len(counts) else counts
    return unique, counts, contexts, totals, kinds


def _look_up(known: NDArray[Any], values: NDArray[Any], keys: NDArray[Any]) -> NDArray[Any]:
    """The value of each key, 0 if it is not among the sorted `known`."""
    if not len(known):
        return np.zeros(len(keys), np.int64)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)


# lm-eval ----------------------------------------------------------------------------------------


def run_tasks(
    loaded: Loaded, tasks: list[str], batch_size: int, context: int, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Return the metrics of lm-eval tasks, named as there without the filter ("bits_per_byte").

    `tasks` are names of tasks that lm-eval contains, or paths of task files (YAML); the folder of a
    file is searched for what it includes. `limit` is the documents per task; None for all.

    Raises:
        UserError: lm-eval is not installed, or does not know a task, a file names code, or a task
            generates more tokens than the context has.
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
            raise UserError(f"--tasks {path}: no such file")
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(include_path=sorted({str(path.parent.resolve()) for path in files}))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"lm-eval has no task {', '.join(unknown)}; list them with `lm-eval ls tasks`, or give "
            "the path of a task file"
        )

    class FittingLM(HFLM):
        """`HFLM` for contexts below lm-eval's default of 256 tokens to generate.

        In rolling windows it adds no second separator, because lm-eval adds one itself.
        """

        @property
        def max_gen_toks(self) -> int:
            return min(super().max_gen_toks, self.max_length // 2)

        def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
            before, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(*args, **kwargs)
            finally:
                self.add_bos_token = before

    model = FittingLM(
        pretrained=loaded.model,  # pyright: ignore[reportArgumentType]
        tokenizer=loaded.tokenizer,  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        max_length=context,
    )
    try:
        results = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, limit=limit)
    except AssertionError as error:
        if "max tokens to generate" not in str(error):
            raise
        raise UserError(
            f"a task asks for as many new tokens as the context of {context} has, or more (its "
            "max_gen_toks): use a model of a longer context"
        ) from error
    assert results is not None  # None only in the helper processes of a distributed run
    return {
        task: {key.removesuffix(",none"): value for key, value in values.items()}
        for task, values in results["results"].items()
    }


def _task_name(path: Path) -> str:
    """The name in a task file, if neither it nor what it includes names code (`!function`)."""
    name, seen, queue = read_settings(path).get("task"), set(), [path]
    if not isinstance(name, str):
        raise UserError(f"{path} is not a task file: it has no key `task`")
    while queue:
        file = queue.pop().resolve()
        if file not in seen:
            seen.add(file)
            include = read_settings(file).get("include", [])
            parts = include if isinstance(include, list) else [include]
            queue += [file.parent / str(part) for part in parts]
    return str(name)
