"""Scores of a model on text: the sum of nats over documents, in windows of the model's context.

Each document is scored on its own. Its first token is predicted from the separator, every other
token from the tokens before it in its window. Windows advance by `stride` tokens: with a stride
equal to the context, windows are disjoint blocks (and the last one reaches back to be full); a
smaller stride gives tokens a longer past and takes more time. Separators are not scored, because
they have no bytes. `loglikelihood_rolling` of lm-eval makes the same windows if the stride is the
context.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from complexity_lm.conversations import IGNORED, encode_conversations
from complexity_lm.data import fingerprint
from complexity_lm.tokenizer import check_lossless, encode_text, separator_id
from inl_core.run.errors import UserError
from inl_core.run.progress import Progress


@dataclass(frozen=True)
class Score:
    """The sum of -log p over the tokens of a text, whose length in UTF-8 is `bytes`."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); depends on the tokenizer."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class Window:
    """Inputs ``begin:end`` of a document; the last `scored` predictions count."""

    begin: int
    end: int
    scored: int


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Split a document into windows that score each of its `tokens` once.

    The inputs are the separator and all tokens but the last.
    """
    done = 0
    while done < tokens:
        scored = min(tokens - done, context if done == 0 else stride)
        done += scored
        yield Window(max(0, done - context), done, scored)


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    context: int,
    stride: int | None = None,
    batch_size: int = 16,
) -> Score:
    """Score documents in windows of `context` tokens.

    `stride` is the tokens scored by each window after the first of a document; None means
    `context`. `batch_size` windows run at once.

    Raises:
        UserError: `context` or `stride` is out of range, there is no text, or the tokenizer loses
            some of it (its ids decode to another text, whose bytes are not those that count).
    """
    _check_context(model, context)
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"stride is {stride}; expected 1 to {context}, the context")
    documents = [_encode(tokenizer, text) for text in texts]
    jobs = [
        (document, window)
        for document in documents
        for window in windows(len(document) - 1, context, stride)
    ]
    if not jobs:
        raise UserError("there is no text to score")
    # Windows of similar length share a batch: only short documents are padded, and little.
    jobs.sort(key=lambda job: job[1].begin - job[1].end)
    nats = torch.zeros((), dtype=torch.float64)
    with Progress("scoring", len(jobs), "window") as progress:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            nats += _batch_nats(model, batch)
            progress.update(len(batch))
    return Score(
        nats=float(nats),
        tokens=sum(len(document) - 1 for document in documents),
        bytes=sum(len(text.encode()) for text in texts),
    )


def score_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[str],
    context: int,
    batch_size: int = 16,
) -> Score:
    """Score the answers of conversations (JSON of messages), each given what precedes it.

    Raises:
        UserError: `context` is out of range, or no conversation has an answer and fits in it.
    """
    _check_context(model, context)
    documents = datasets.Dataset.from_dict({"text": list(conversations)})
    encoded: Any = encode_conversations(documents, tokenizer, context, "scored")
    rows: list[Any] = sorted(encoded, key=lambda row: -len(row["input_ids"]))
    nats = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), Progress("scoring", len(rows), "conversation") as progress:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            ids, labels = (
                pad_sequence([torch.tensor(row[name]) for row in batch], True, value)
                for name, value in (("input_ids", 0), ("labels", IGNORED))
            )
            # Attention is causal and padding is on the right: it does not affect scored positions.
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            nats += _nats(logits[:, :-1], labels[:, 1:])
            progress.update(len(batch))
    answers = sum(label != IGNORED for row in rows for label in row["labels"])
    return Score(float(nats), answers, sum(row["bytes"] for row in rows))


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p over the targets that are not ignored, () float64 on the CPU."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    targets = targets.flatten().to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    return losses.double().sum().cpu()


def _check_context(model: PreTrainedModel, context: int) -> None:
    longest = int(model.config.max_position_embeddings)
    if not 1 <= context <= longest:
        raise UserError(f"context is {context}; this model accepts 1 to {longest} tokens")


def score_report(score: Score, texts: Sequence[str]) -> dict[str, Any]:
    """Convert a score to the keys of `result.json`."""
    return {
        "metrics": {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
        },
        "n_documents": len(texts),
        "n_tokens": score.tokens,
        "n_bytes": score.bytes,
        "text_fingerprint": fingerprint(texts),
    }


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    ids: Any = encode_text(tokenizer, text)["input_ids"]
    check_lossless(tokenizer, text, ids)
    return torch.tensor([separator_id(tokenizer), *ids])


@torch.no_grad()
def _batch_nats(model: PreTrainedModel, jobs: Sequence[tuple[Tensor, Window]]) -> Tensor:
    longest = max(window.end - window.begin for _, window in jobs)
    ids = torch.zeros(len(jobs), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORED)
    for row, (document, window) in enumerate(jobs):
        length = window.end - window.begin
        ids[row, :length] = document[window.begin : window.end]
        mask[row, :length] = 1
        begin = length - window.scored
        targets[row, begin:length] = document[window.begin + begin + 1 : window.end + 1]
    # Attention is causal and padding is on the right: it does not affect scored positions.
    attention_mask = None if bool(mask.all()) else mask.to(model.device)
    logits = model(
        input_ids=ids.to(model.device), attention_mask=attention_mask, use_cache=False
    ).logits
    return _nats(logits, targets)
