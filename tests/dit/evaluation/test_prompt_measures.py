"""Measures of prompts: probes, what counts as asked, their floor, and near copies of captions."""

import csv
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from complexity_dit.config import DataConfig, EvalConfig, SampleConfig, TextEncoderConfig
from complexity_dit.data.captions import Captions
from complexity_dit.data.dataset import load_data
from complexity_dit.evaluation.breakdown import memorisation
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.evaluation.features import draw
from complexity_dit.evaluation.prompts import (
    Columns,
    Sides,
    auc,
    columns_of,
    content_words,
    fit_probe,
    measure_prompts,
    says,
)
from complexity_dit.evaluation.report import Pictures, format_result, render
from complexity_dit.models.text import build_text_encoder, text_width
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from inl_core.run.errors import UserError
from support.networks import randomised, small_network
from support.pictures import pictures, write_folder

STYLES, WIDTH = ("Cubism", "Fauvism", "Ukiyo e"), 8
COLUMNS = Columns(["style"], ["title"])


# Probes


def test_a_probe_is_ridge_regression_of_the_strength_that_leaves_one_out_best() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((14, 3)) * [1.0, 5.0, 0.0] + [0.0, 0.0, 7.0]
    y = (x[:, :2] + rng.standard_normal((14, 2)) > 0).astype(float)
    centre, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)

    def solved(x: np.ndarray, y: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        z = (x - centre) / scale
        middle = z.mean(0)
        weights = np.linalg.solve(
            (z - middle).T @ (z - middle) + strength * np.eye(3), (z - middle).T @ (y - y.mean(0))
        )
        return weights, y.mean(0) - middle @ weights

    def left_out(strength: float) -> float:
        errors = []
        for i in range(14):
            rest = np.arange(14) != i
            weights, bias = solved(x[rest], y[rest], strength)
            errors.append(y[i] - ((x[i] - centre) / scale) @ weights - bias)
        return float(np.mean(np.square(errors)))

    best = min(14 * np.logspace(-4, 2, 13), key=left_out)
    weights, bias = solved(x, y, best)
    np.testing.assert_allclose(fit_probe(x, y)(x), (x - centre) / scale @ weights + bias)


def test_auc_is_the_probability_of_a_larger_score_by_its_definition() -> None:
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(-9, 9, 60).astype(float), rng.random(60) < 0.3
    a, b = scores[positive][:, None], scores[~positive][None]
    assert auc(scores, positive) == pytest.approx(((a > b) + (a == b) / 2).mean(), rel=1e-6)
    assert auc(1e6 * scores, positive) == auc(scores, positive)


# What prompts say


def test_words_and_names_of_a_prompt() -> None:
    assert content_words("The Seine at Été, after 1872: a lady's boat") == {
        "seine", "été", "lady", "boat",
    }  # fmt: skip
    assert says("an ukiyo E landscape", "Ukiyo e")
    assert says("landscape, Cubism", "Cubism")
    assert not says("landscapes by juan gris", "landscape")
    assert not says("", "Cubism")


def test_columns_are_names_that_repeat_and_the_texts_of_captions() -> None:
    rows = [
        {"style": STYLES[i % 3], "title": f"title-{i}", "year": 1800 + i, "text": "a b"}
        for i in range(12)
    ]
    kinds = {"style": "text", "title": "text", "year": "number", "text": "text"}
    known = [json.dumps(row) for row in rows]
    config = DataConfig(caption_template="{style}: {title}", text_column="text")
    captions = Captions(known, kinds, config)
    texts = [captions.texts_of(i) for i in range(12)]
    assert texts[4] == {"style": ["Fauvism"], "title": ["title"], "year": ["1804"], "text": ["a b"]}
    # The titles are numbered in the table, and one word when they are cleaned.
    texts = [text | {"title": [f"title {i}"]} for i, text in enumerate(texts)]
    assert columns_of(captions, texts, ()) == Columns(["style"], ["text", "title"])
    assert columns_of(captions, texts, ["year"]).fields == ["style", "year"]


# Samples of known quality

N, TRAIN = 600, 1200
TITLE_WORDS = ("river", "snow")


def known_images(n: int, rng: np.random.Generator) -> list[dict[str, Sequence[str]]]:
    """Rows with a style, and a title of two words, each there with probability 0.3."""
    found = []
    for _ in range(n):
        words = [word for word in TITLE_WORDS if rng.random() < 0.3]
        style = {"style": [STYLES[rng.integers(3)]]}
        found.append(style | ({"title": [" ".join(words)]} if words else {}))
    return found


def features_of(known: list, rng: np.random.Generator, apart: float) -> np.ndarray:
    """Noise, moved by `apart` along an axis for the style and for each word of the title."""
    x = rng.standard_normal((len(known), WIDTH))
    for row, texts in zip(x, known, strict=True):
        row[STYLES.index(texts["style"][0])] += apart
        for word in texts.get("title", [""])[0].split():
            row[4 + TITLE_WORDS.index(word)] += apart
    return x


def prompts_of(known: list, rng: np.random.Generator) -> list[str]:
    """Style and title, each left out of a quarter of the prompts."""
    return [
        ", ".join(t for c in ("style", "title") for t in row.get(c, ()) if rng.random() > 0.25)
        for row in known
    ]


@pytest.fixture(scope="module")
def sides():
    """Prompts, what is known, and features of real and training images; of samples by a function.

    An axis with two classes 2 apart gives a best AUC of Phi(2 / sqrt 2) = 0.921.
    """
    rng = np.random.default_rng(0)
    known, train = known_images(N, rng), known_images(TRAIN, rng)
    real, of_train = features_of(known, rng, 2.0), features_of(train, rng, 2.0)
    prompts = prompts_of(known, rng)

    def measured(generated, prompts=prompts, **options):
        copies = memorisation(generated, real, of_train)
        return measure_prompts(
            prompts, known, Sides(generated, real, of_train), train, COLUMNS, copies, **options
        )

    return prompts, known, real, measured


def test_real_images_as_samples_have_the_numbers_of_real_images(sides) -> None:
    prompts, known, real, measured = sides
    found = measured(real)
    style, words = found.summary["fields"]["style"], found.summary["words"]
    assert style["n"] == sum(row["style"][0] in p for p, row in zip(prompts, known, strict=True))
    assert style["n"] < N
    assert style["classes"] == 3
    assert style["ratio"] == 1
    assert 0.75 < style["painted"] == style["real"] < 1
    assert style["shuffled"] == pytest.approx(1 / 3, abs=0.03)
    assert words["n"] == 2
    assert words["painted"] == words["real"] == pytest.approx(0.921, abs=0.03)
    assert words["shuffled"] == pytest.approx(0.5, abs=0.02)
    assert not found.absent


def test_samples_that_ignore_their_prompts_are_at_the_floor(sides) -> None:
    _, _, real, measured = sides
    found = measured(real[np.random.default_rng(9).permutation(N)])
    style, words = found.summary["fields"]["style"], found.summary["words"]
    assert style["painted"] == pytest.approx(style["shuffled"], abs=5 * style["shuffled_std"])
    assert style["ratio"] == pytest.approx(style["painted"] / style["real"])
    assert words["painted"] == pytest.approx(0.5, abs=5 * words["shuffled_std"])
    assert words["real"] > 0.85


def test_only_what_a_prompt_says_counts(sides) -> None:
    """A style and a word that are left out of the prompt are asked of no sample."""
    prompts, known, real, measured = sides
    found = measured(real)
    both = [(prompt, row.get("title", [""])[0]) for prompt, row in zip(prompts, known, strict=True)]
    for word, row in found.summary["words"]["auc"].items():
        assert row["n"] == sum(word in prompt for prompt, _ in both)
        assert row["n"] < sum(word in title for _, title in both)
    # Samples whose prompt lacks the style may show any: nothing changes.
    silent = np.array([row["style"][0] not in p for p, row in zip(prompts, known, strict=True)])
    others = real.copy()
    others[silent, :3] = others[silent][:, [1, 2, 0]]
    assert (
        measured(others).summary["fields"]["style"]["painted"]
        == (found.summary["fields"]["style"]["painted"])
    )
    assert [bool(name) for name in found.table["style"]] == (~silent).tolist()


def test_a_label_that_is_asked_for_counts_as_said(sides) -> None:
    _, _, real, measured = sides
    labelled = {"style": np.ones(N, bool)}
    assert measured(real, labelled=labelled).summary["fields"]["style"]["n"] == N


def test_the_floor_is_a_function_of_the_seed(sides) -> None:
    _, _, real, measured = sides
    first, again, other = (measured(real, seed=seed).summary for seed in (0, 0, 1))
    assert first == again
    assert first["words"]["shuffled"] != other["words"]["shuffled"]


def test_numbers_of_too_few_prompts_are_absent_with_the_reason(sides) -> None:
    _, _, real, measured = sides
    found = measured(real, prompts=[""] * N)
    assert set(found.summary) == {"n_train", "fields"}
    assert found.summary["fields"] == {}
    assert found.absent["prompts.style"] == "0 of 600 prompts say it; 5 are needed"
    assert set(found.absent) == {"prompts.style", "prompts.words", "prompts.copies"}
    assert "title" in found.absent["prompts.words"]


def test_near_copies_are_counted_by_whether_the_caption_is_similar() -> None:
    """Of 30 samples 8 are copies: 6 of a training image with the title asked for, 2 of another."""
    rng = np.random.default_rng(3)
    titles = [["river winter"]] * 10 + [["girl hat"]] * 10 + [["ships"]] * 10
    known = [{"title": title} for title in titles]
    prompts = [" ".join(title) for title in titles[:25]] + [""] * 5
    train, real = rng.standard_normal((30, WIDTH)), 3 * rng.standard_normal((30, WIDTH))
    samples = 50 + rng.standard_normal((30, WIDTH))
    samples[:6] = train[:6]
    samples[10:12] = train[:2]
    found = measure_prompts(
        prompts, known, Sides(samples, real, train), known, Columns([], ["title"]),
        memorisation(samples, real, train),
    )  # fmt: skip
    copies = found.summary["copies"]
    assert copies["n"] == 30
    assert copies["near_copies"] == pytest.approx(8 / 30)
    nearest = found.table["training_image"]
    similar = [i for i in range(25) if known[nearest[i]] == known[i]]
    assert copies["similar_caption"] == {"n": len(similar), "near_copies": 6 / len(similar)}
    assert copies["other_caption"]["n"] == 25 - len(similar)
    assert copies["other_caption"]["near_copies"] == pytest.approx(2 / (25 - len(similar)))
    assert copies["similar"] == pytest.approx(len(similar) / 25)
    assert found.table["caption_similarity"][0] == 1
    assert found.table["caption_similarity"][-1] == ""


# The command

QUICK = EvalConfig(num_images=64, weights="random", device="cpu", quiet=True, bootstrap=0)
SAMPLE = SampleConfig(num_inference_steps=1)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """200 pictures; each title has a word of its own, and one that half of them have."""
    folder = write_folder(tmp_path / "real", pictures(200, 0, 8))
    pairs = itertools.product("abcdefghijklmno", repeat=2)
    lines = [
        f"{i:04d}.png,{STYLES[i % 2]},{'a-river' if i % 4 < 2 else 'the-lady'}-{a}{b}x-{i}"
        for i, (a, b) in zip(range(200), pairs, strict=False)
    ]
    (folder / "metadata.csv").write_text("\n".join(["file_name,style,title", *lines]))
    return f"imagefolder:{folder}"


def data_of(source: str) -> DataConfig:
    template = "{style}: {title}"
    return DataConfig(
        source=source, resolution=8, holdout=0.4, label_fields=[], caption_template=template
    )


@pytest.fixture
def captioned(pipe: ComplexityDiTPipeline) -> ComplexityDiTPipeline:
    """A pipeline with a text encoder and no label fields."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = TextEncoderConfig(source="lm", max_length=8, overrides=sizes | {"vocab_size": 280})
    tokenizer, encoder = build_text_encoder(config, ["Cubism: river"])
    network = small_network(label_fields=[], num_classes=[], caption_channels=text_width(encoder))
    pipeline = ComplexityDiTPipeline(
        randomised(network), pipe.scheduler, text_encoder=encoder, tokenizer=tokenizer,
        prompt_length=8,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.usefixtures("own_cache")
def test_prompts_are_measured_and_written_for_a_pipeline_without_label_fields(
    captioned: ComplexityDiTPipeline, source: str, tmp_path: Path
) -> None:
    data, out = data_of(source), tmp_path / "out"
    config = replace(QUICK, prompts=True)
    result = evaluate(captioned, source, out, config, SAMPLE, data)
    assert json.loads((out / "result.json").read_text()) == result
    found = result["prompts"]
    train, held = (load_data(data, split, captions=True) for split in ("train", "heldout"))
    assert found["n_train"] == result["settings"]["n_searched"] == len(train)
    assert set(found["fields"]) == {"style"}
    assert found["fields"]["style"]["classes"] == 2
    assert set(found["words"]["auc"]) == {"river", "lady"}
    assert found["copies"]["near_copies"] == result["metrics"]["closer_than_1_percent"]
    with (out / "prompts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["sample"]) for row in rows] == list(range(64))
    drawn = draw(len(held), 64, 0).tolist()
    assert [int(row["reference"]) for row in rows] == drawn
    assert [row["prompt"] for row in rows] == held.captions.captions_of(drawn, SAMPLE.seed, 0)
    asked = [row for row in rows if row["style"]]
    assert all(row["style"] in row["prompt"] for row in asked)
    assert len(asked) == found["fields"]["style"]["n"]
    for side in ("painted", "real"):
        share = np.mean([row["style"] == row[f"style_{side}"] for row in asked])
        assert share == pytest.approx(found["fields"]["style"][side])
    again = evaluate(captioned, source, None, config, SAMPLE, data)
    assert again["prompts"] == found
    text = format_result(result)
    assert "prompts, by probes fitted on" in text
    assert "words (AUC)" in text
    images = np.zeros((2, 8, 8, 3), np.uint8)
    assert "<td>words (AUC)</td>" in render(result, Pictures(images))


@pytest.mark.usefixtures("own_cache")
def test_what_cannot_be_asked_by_prompts_is_refused(
    pipe: ComplexityDiTPipeline, captioned: ComplexityDiTPipeline, source: str, tmp_path: Path
) -> None:
    config, folder = replace(QUICK, prompts=True), source.partition(":")[2]
    with pytest.raises(UserError, match="its label fields are style, genre: --label_field"):
        evaluate(pipe, source, config=config)
    with pytest.raises(UserError, match="the target is images"):
        evaluate(folder, source, config=config)
    with pytest.raises(UserError, match=r"pictures with captions, and .*real has none"):
        evaluate(captioned, folder, config=config)
    plain = DataConfig(source=source, resolution=8, label_fields=[])
    with pytest.raises(UserError, match="no captions for the text encoder"):
        evaluate(captioned, source, config=config, data=plain)
    other = replace(plain, caption_template="{school}")
    with pytest.raises(UserError, match="'school', which is not in the data"):
        evaluate(captioned, source, config=config, data=other)
