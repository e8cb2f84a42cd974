"""Training on captions: an encoder trained along or frozen, exact resume, and refused settings."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from complexity_dit.config import EvalConfig, EvalSampleConfig, LoraOptions, TextEncoderConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.evaluation import samples
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.evaluation.features import draw
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import iter_samples
from complexity_dit.training import callbacks, text
from complexity_dit.training.batches import StepBatches
from complexity_dit.training.text import (
    FrozenEncoder,
    caption_tokens,
    seeded_text_encoder,
    text_inputs,
)
from complexity_dit.training.train import train
from complexity_lm.tokenizer import train_tokenizer
from inl_core.run.errors import UserError
from support.outcomes import last_checkpoint, losses_of, tensor_files

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
TRAINED = TextEncoderConfig(source="lm", max_length=40, overrides={"vocab_size": 300, **SIZES})
CAPTION = "{style} in {genre}"


def encoder_of(run):
    captions = load_data(run.data, "train", captions=True).captions
    return seeded_text_encoder(run, captions)


@pytest.fixture
def captioned(small_run):
    """A run that composes captions of the art set's labels, and reads them by a small model."""
    data = dataclasses.replace(small_run.data, caption_template=CAPTION)
    return dataclasses.replace(small_run, data=data, text_encoder=TRAINED, heldout_every=4)


@pytest.fixture
def t5(tmp_path) -> TextEncoderConfig:
    """A frozen text encoder with random weights."""
    torch.manual_seed(5)
    tokenizer = train_tokenizer(["Cubism in dawn, Fauvism in ocean"], 280)
    sizes = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    T5EncoderModel(T5Config(num_heads=2, **sizes)).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    return TextEncoderConfig(source=f"hf:{tmp_path / 't5'}", max_length=40)


def batches_of(run, rank=0, world=1, **fields):
    run = dataclasses.replace(run, **fields)
    tokenizer, _ = encoder_of(run)
    data = load_data(run.data, "train", captions=True)
    return StepBatches(data, run, rank, world, tokenizer=tokenizer), tokenizer


def test_a_batch_has_the_tokens_of_its_captions(captioned):
    batches, tokenizer = batches_of(captioned, batch_size=8)
    drawn = batches.drawn(3)
    captions = batches.data.captions.captions_of(drawn["indices"], captioned.seed, 3)
    words = tokenizer.batch_decode(drawn["input_ids"], skip_special_tokens=True)
    for mask, found, caption in zip(drawn["attention_mask"], words, captions, strict=True):
        assert found == caption if mask.any() else True
    assert drawn["input_ids"].shape[1] % 8 == 0


def test_captions_are_shared_between_processes_and_change_nothing_else(captioned):
    batch = batches_of(captioned)[0][5]
    parts = [batches_of(captioned, rank, 2)[0][5] for rank in (0, 1)]
    for name, value in batch.items():
        for rank, part in enumerate(parts):
            assert torch.equal(value[rank::2], part[name])
    plain = StepBatches(load_data(captioned.data, "train"), captioned, 0, 1)[5]
    assert batch.keys() - plain.keys() == {"input_ids", "attention_mask"}
    assert all(torch.equal(batch[name], value) for name, value in plain.items())


def test_captions_are_dropped_alone_and_together_with_all_labels(captioned):
    objective = dataclasses.replace(captioned.objective, label_dropout=0.0, label_dropout_all=0.25)
    template = dataclasses.replace(captioned.data, caption_template=None, text_column="style")
    batches, _ = batches_of(captioned, batch_size=512, objective=objective, data=template)
    batch = batches[0]
    empty = ~batch["attention_mask"].any(dim=1)
    together = (batch["labels"] == -1).all(dim=1)
    assert empty[together].all()
    assert float(empty[~together].float().mean()) == pytest.approx(0.1, abs=0.05)
    assert float(together.float().mean()) == pytest.approx(0.25, abs=0.06)


def test_an_empty_caption_has_no_tokens_and_a_long_one_is_cut(captioned):
    _, tokenizer = batches_of(captioned)
    ids, mask = caption_tokens(tokenizer, ["", "a", "b" * 100], 24)
    assert mask.sum(dim=1).tolist()[0] == 0
    assert mask.sum(dim=1).tolist()[2] == ids.shape[1] == 24
    assert caption_tokens(tokenizer, ["", ""], 24)[0].shape == (2, 8)
    assert caption_tokens(tokenizer, [""], 24, cut=False)[0].shape == (1, 24)


def test_a_trained_encoder_resumes_bit_by_bit_and_is_averaged(captioned, resumed_as_straight):
    resumed_as_straight(captioned)


def test_a_trained_encoder_is_in_the_checkpoint_and_in_the_pipeline(captioned):
    folder = train(captioned)
    _, new = encoder_of(captioned)
    raw = load_file(last_checkpoint(captioned.out) / "model.safetensors")
    averaged = ComplexityDiTPipeline.from_pretrained(folder).text_encoder.state_dict()
    before = dict(new.named_parameters())
    moved = [n for n in before if not torch.equal(raw[f"text_encoder.{n}"], before[n])]
    assert "embed_tokens.weight" in moved
    assert len(moved) > len(before) / 2
    assert not any(torch.equal(raw[f"text_encoder.{n}"], averaged[n]) for n in moved)
    names = {name.partition(".")[0] for name in raw}
    assert names == {"network", "text_encoder"}


def test_a_frozen_encoder_resumes_bit_by_bit(captioned, t5, resumed_as_straight):
    resumed_as_straight(dataclasses.replace(captioned, text_encoder=t5))


def test_a_frozen_encoder_stays_as_it_is(captioned, t5):
    run = dataclasses.replace(captioned, text_encoder=t5)
    pipe = ComplexityDiTPipeline.from_pretrained(train(run))
    _, before = encoder_of(run)
    for name, value in before.state_dict().items():
        assert torch.equal(pipe.text_encoder.state_dict()[name], value)
    assert pipe.transformer.config.caption_channels == before.config.hidden_size
    raw = load_file(last_checkpoint(run.out) / "model.safetensors")
    assert not any("encoder" in name for name in raw)


def features_of(frozen, tokenizer, captions):
    ids, mask = caption_tokens(tokenizer, captions, 24)
    batch = frozen({"input_ids": ids, "attention_mask": mask, "x": torch.zeros(1)})
    assert batch.keys() == {"x", "encoder_hidden_states", "encoder_attention_mask"}
    rows = zip(batch["encoder_hidden_states"], mask, strict=True)
    return [row[known] for row, known in rows]


def test_features_of_a_caption_are_computed_once_and_do_not_depend_on_the_batch(captioned, t5):
    tokenizer, encoder = encoder_of(dataclasses.replace(captioned, text_encoder=t5))
    frozen = FrozenEncoder(encoder, 24)
    captions = [f"caption {i % 20}" + "!" * (i % 7) for i in range(40)]
    calls = []
    encoder.register_forward_hook(lambda module, inputs, output: calls.append(1))
    together = features_of(frozen, tokenizer, captions)
    assert len(calls) == -(-len(set(captions)) // 16)
    again = features_of(frozen, tokenizer, captions[::-1])[::-1]
    assert len(calls) == -(-len(set(captions)) // 16)
    alone = [features_of(FrozenEncoder(encoder, 24), tokenizer, [one])[0] for one in captions]
    for one, two, three in zip(together, again, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert features_of(frozen, tokenizer, ["", "a"])[0].shape == (0, 16)


def test_the_features_that_are_kept_have_a_limit(captioned, t5, monkeypatch):
    tokenizer, encoder = encoder_of(dataclasses.replace(captioned, text_encoder=t5))
    frozen = FrozenEncoder(encoder, 24)
    monkeypatch.setattr(text, "CACHE_BYTES", 4000)
    for i in range(100):
        features_of(frozen, tokenizer, [f"caption {i}", "the same"])
    kept = sum(states.nbytes for states in frozen._kept.values())
    assert kept == frozen._bytes <= 4000
    assert len(frozen._kept) > 2


def test_held_out_pictures_are_measured_with_their_captions(captioned, t5, monkeypatch):
    found = []

    def recorded(part):
        found.append(set(text_inputs(part)))
        return text_inputs(part)

    monkeypatch.setattr(callbacks, "text_inputs", recorded)
    train(captioned)
    assert found
    assert all(names == {"input_ids", "attention_mask"} for names in found)
    found.clear()
    out = f"{captioned.out}-frozen"
    train(dataclasses.replace(captioned, out=out, text_encoder=t5))
    assert found
    assert all(names == {"encoder_hidden_states", "encoder_attention_mask"} for names in found)


def test_a_run_that_reads_other_captions_is_refused(captioned, t5):
    train(captioned)
    again = dataclasses.replace(captioned, resume="auto", steps=9)
    template = dataclasses.replace(captioned.data, caption_template="{genre}")
    with pytest.raises(UserError, match="caption_template is"):
        train(dataclasses.replace(again, data=template))
    same = dataclasses.replace(TRAINED, source="none", overrides={})
    with pytest.raises(UserError, match="was trained with other settings"):
        train(dataclasses.replace(again, text_encoder=same))
    with pytest.raises(UserError, match="was trained with other settings"):
        train(dataclasses.replace(again, text_encoder=t5))


def test_another_frozen_encoder_is_refused(captioned, t5):
    run = dataclasses.replace(captioned, text_encoder=t5)
    train(run)
    folder = Path(t5.source.removeprefix("hf:"))
    encoder = T5EncoderModel.from_pretrained(folder)
    with torch.no_grad():
        encoder.shared.weight += 1
    encoder.save_pretrained(folder)
    with pytest.raises(UserError, match="text encoder is "):
        train(dataclasses.replace(run, resume="auto", steps=9))


def test_captions_that_are_not_read_are_named_in_one_line(captioned, caplog):
    run = dataclasses.replace(captioned, text_encoder=TextEncoderConfig(), steps=1)
    with caplog.at_level(logging.INFO):
        train(run)
    assert [line for line in caplog.messages if "not used" in line] == [
        "not used: caption_template; for a network that reads captions, set "
        "--text_encoder.source lm"
    ]


def test_a_run_starts_from_a_pipeline_with_and_without_captions(captioned, small_run, tmp_path):
    plain = train(dataclasses.replace(small_run, out=str(tmp_path / "plain")))
    first = dataclasses.replace(captioned, init_from=str(plain), steps=1)
    folder = train(first)
    out, still = str(tmp_path / "second"), dataclasses.replace(first.optim, lr=1e-12)
    train(dataclasses.replace(first, out=out, init_from=str(folder), optim=still))
    weights = load_file(last_checkpoint(out) / "model.safetensors")
    saved = tensor_files(folder)["text_encoder/model.safetensors"]
    for name, value in saved.items():
        assert weights[f"text_encoder.{name}"].numpy().tobytes() == value, name


def test_an_adapter_is_trained_without_captions(captioned):
    with pytest.raises(UserError, match="is for a full network"):
        dataclasses.replace(captioned, lora=LoraOptions(rank=2))


def test_the_record_of_a_checkpoint_names_the_captions(captioned):
    train(captioned)
    meta = json.loads((last_checkpoint(captioned.out) / "state.json").read_text())
    captions = load_data(captioned.data, "train", captions=True).captions
    assert meta["data"]["captions"] == captions.fingerprint
    assert losses_of(captioned.out)


@pytest.fixture
def asked(monkeypatch):
    """The prompts of all images that are sampled."""
    prompts = []

    def recorded(*args, **options):
        prompts.append(options["prompts"])
        return iter_samples(*args, **options)

    for module in (callbacks, samples):
        monkeypatch.setattr(module, "iter_samples", recorded)
    return prompts


def test_grids_and_evaluations_ask_for_the_captions_of_heldout_pictures(captioned, asked):
    run = dataclasses.replace(captioned, sample_every=8)
    folder = train(run)
    heldout = load_data(run.data, "heldout", captions=True)
    shown = heldout.captions.captions_of(range(len(heldout)), run.seed, 0)
    assert asked == 2 * [[text for text in shown[:12] for _ in range(4)]]
    asked.clear()
    config = EvalConfig.brief(num_images=4, weights="random", quiet=True)
    evaluate(str(folder), "art", None, config, EvalSampleConfig(num_inference_steps=1))
    rows = draw(len(heldout), 4, config.seed)
    expected = heldout.captions.captions_of(np.resize(rows, 4).tolist(), 0, 0)
    assert asked
    assert all(prompts == expected for prompts in asked)


def test_an_evaluation_against_a_folder_without_captions_says_so(captioned, folders, caplog):
    run = dataclasses.replace(captioned, steps=1)
    config = EvalConfig.brief(num_images=4, weights="random", quiet=True)
    evaluate(
        str(train(run)), str(folders[1]), None, config, EvalSampleConfig(num_inference_steps=1)
    )
    assert (
        "the reference has no captions: the samples are those of the null text" in caplog.messages
    )
