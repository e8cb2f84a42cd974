"""The model under other people's tools: Trainer, packing, Auto classes, heads, beside Llama."""

import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from complexity_lm import DeepConfig, DeepForCausalLM, DeepModel
from support.processes import python

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def beside_llama(**settings):
    """Our model and transformers' Llama, of the same sizes."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **settings))
    return DeepForCausalLM(DeepConfig(**SIZES, **settings)), llama


def rows_of(ids):
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def collated(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def trainer(model, folder, rows, **settings) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **settings
    )
    return Trainer(model, arguments, train_dataset=rows, data_collator=collated)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_shifts_the_labels_for_label_smoothing(ids, tmp_path, smoothing) -> None:
    repeated = torch.arange(1, 13).repeat(8, 1)  # each token determines the next one
    accuracies = []
    for model in beside_llama():
        run = trainer(
            model, tmp_path, rows_of(repeated), label_smoothing_factor=smoothing, max_steps=40,
            per_device_train_batch_size=8, learning_rate=1e-2, save_strategy="no",
        )  # fmt: skip
        run.train()
        with torch.no_grad():
            guess = model.eval()(repeated).logits[:, :-1].argmax(-1)
        accuracies.append((guess == repeated[:, 1:]).float().mean().item())
    assert accuracies == [1.0, 1.0]


REMOTE = """
import sys
import torch
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

folder = sys.argv[1]
kinds = (  # the heads first: AutoModel has not seen the config of the folder yet
    AutoModelForSequenceClassification, AutoModelForTokenClassification,
    AutoModelForQuestionAnswering, AutoModel, AutoModelForCausalLM,
)
for kind in kinds:
    model = kind.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    assert "complexity_lm" not in sys.modules
    model.save_pretrained(folder + "/again" + kind.__name__)
    for other in kinds:
        other.from_pretrained(folder + "/again" + kind.__name__, trust_remote_code=True)
assert "DeepForCausalLM" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
find = pipeline(
    "feature-extraction", folder, tokenizer=folder, trust_remote_code=True, return_tensors=True
)
assert find("ka lo").shape[-1] == model.config.hidden_size
head = folder + "/again" + AutoModelForSequenceClassification.__name__
classify = pipeline("text-classification", head, tokenizer=folder, trust_remote_code=True)
assert classify("ka lo")[0]["label"] in model.config.id2label.values()
print("fine")
"""


def test_a_saved_folder_loads_with_every_auto_class_without_the_package(
    lively, words, tmp_path
) -> None:
    lively().save_pretrained(tmp_path)
    words("<unk>", "ka", "lo", unk_token="<unk>").save_pretrained(tmp_path)
    done = python("-c", REMOTE, tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.stdout.strip().endswith("fine")


def test_features_are_extracted_by_a_pipeline(lively, words, tmp_path) -> None:
    lively().save_pretrained(tmp_path)
    names = [f"w{i}" for i in range(60)]
    words("<unk>", *names, unk_token="<unk>").save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is DeepModel
    find = pipeline("feature-extraction", str(tmp_path), return_tensors=True)
    assert find("w1 w2 w3").shape == (1, 3, 32)


@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "routed"])
@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (AutoModelForSequenceClassification, {"labels": [0, 1, 2]}),
        (AutoModelForTokenClassification, {"labels": [[1] * 11] * 3}),
        (
            AutoModelForQuestionAnswering,
            {"start_positions": [1, 2, 3], "end_positions": [4, 5, 6]},
        ),
    ],
)
def test_a_head_is_fitted_saved_and_loaded(lively, ids, tmp_path, kind, labels, experts) -> None:
    lively(num_experts=experts).save_pretrained(tmp_path / "base")
    model = kind.from_pretrained(tmp_path / "base", num_labels=3).train()
    wanted = {name: torch.tensor(value) for name, value in labels.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, **wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path / "tuned")
    again = kind.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        for ours, theirs in zip(model(ids).to_tuple(), again(ids).to_tuple(), strict=True):
            if isinstance(ours, torch.Tensor):
                assert torch.equal(ours, theirs)


def test_a_text_is_classified_at_its_last_token(lively, ids, tmp_path) -> None:
    lively().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    padded = torch.nn.functional.pad(ids, (0, 4))
    mask = (padded != 0).long()
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(model(padded, attention_mask=mask).logits, expected)


@pytest.mark.parametrize(
    "how", [{}, {"activation_checkpointing": True}], ids=["plain", "recompute"]
)
def test_trainer_saves_a_folder_that_caches(ids, tmp_path, how) -> None:
    model, _ = beside_llama()
    run = trainer(
        model, tmp_path / "run", rows_of(ids), max_steps=1, save_steps=1, **how
    )  # fmt: skip
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert model.config.use_cache is False  # Trainer's setting, which stays in memory
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-1"):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert DeepForCausalLM.from_pretrained(tmp_path / "final")(ids).past_key_values is not None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("end", [5, [7, 5]])
def test_a_separator_that_pads_learns(ids, fit, tied, end) -> None:
    config = DeepConfig(**SIZES, pad_token_id=5, eos_token_id=end, tie_word_embeddings=tied)
    model = DeepForCausalLM(config)
    row = model.model.embed_tokens.weight[5]
    before = row.detach().clone()
    assert before.abs().sum() > 0
    fit(model, torch.nn.functional.pad(ids, (1, 0), value=5), 2, 1e-2)
    assert (row - before).abs().min() > 0
    # A padding token of its own stays zero.
    config = DeepConfig(**SIZES, pad_token_id=6, eos_token_id=end, tie_word_embeddings=False)
    assert not DeepForCausalLM(config).model.embed_tokens.weight[6].any()


# Packed documents ---------------------------------------------------------------------------------

DOCUMENTS = [[3, 9, 27, 14], [5, 8], [40, 41, 2, 7, 11, 13], [1]]


def flattened() -> dict[str, Any]:
    return dict(DataCollatorWithFlattening()([{"input_ids": ids} for ids in DOCUMENTS]))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"sliding_window": 3}, {"num_experts": 3}, {"dynamics_placement": "branch"}],
    ids=["full", "sliding", "routed", "branch"],
)
def test_packed_documents_equal_separate_ones(lively, attention, settings, use_cache) -> None:
    model = lively(attention, **settings).double()
    batch = flattened()
    assert "attention_mask" not in batch
    with torch.no_grad():
        packed = model(**batch, use_cache=use_cache)
        alone = [model(torch.tensor([ids]), labels=torch.tensor([ids])) for ids in DOCUMENTS]
        across = model(batch["input_ids"]).logits
    expected = torch.cat([one.logits for one in alone], dim=1)
    torch.testing.assert_close(packed.logits, expected)
    assert (across - expected).abs().max() > 0.1
    losses = [
        one.loss * (len(ids) - 1) for one, ids in zip(alone, DOCUMENTS, strict=True) if ids[1:]
    ]
    counted = sum(len(ids) - 1 for ids in DOCUMENTS)
    torch.testing.assert_close(packed.loss, sum(losses) / counted)


def test_packed_documents_of_llama_are_those_of_ours() -> None:
    batch = flattened()
    for model in beside_llama():
        model = model.eval().double()
        with torch.no_grad():
            packed = model(**batch, use_cache=False).logits
            alone = [model(torch.tensor([ids])).logits for ids in DOCUMENTS]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_a_packed_document_gets_no_gradient_from_the_others(lively) -> None:
    model = lively().double()
    batch = flattened()
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    positions = batch["position_ids"]
    model(inputs_embeds=embeddings, position_ids=positions).logits[0, 4:6].sum().backward()
    assert embeddings.grad is not None
    touched = embeddings.grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [4 <= i < 6 for i in range(positions.shape[1])]
