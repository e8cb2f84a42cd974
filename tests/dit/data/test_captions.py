"""Captions: drawn and composed texts, their sources, and what cannot be one."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch

from complexity_dit.config import DataConfig
from complexity_dit.data.captions import PART_DROPOUT, Captions, clean_title, compose, plain
from complexity_dit.data.dataset import load_data
from complexity_dit.data.encode import encode
from complexity_dit.data.latents import (
    CACHE_FILE,
    PLAN_FILE,
    load_training_data,
    source_config,
)
from complexity_dit.models.autoencoder import TinyAutoencoder
from inl_core.run.errors import UserError
from support.pictures import random_image

ROW = {"style": "Cubism", "artist": "juan-gris", "title": "the-lamb-1914(1)"}
TEMPLATE = "{style} by {artist}: {title}"
KINDS = {"text": "text", "tags": "texts", "style": "text", "title": "text", "year": "number"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("title", "cleaned"),
    [
        ("the-lady-s-cove-1897-1.jpg", "the lady's cove"),
        ("argenteuil-1(1)", "argenteuil"),
        ("not_detected_232244-1635", ""),
        ("IMG_2034.JPG", ""),
        ("untitled(2)", ""),
        ("1870-1875", ""),
        ("september-1892", ""),
        ("battle-of-gibraltar-25-april-1607-attributed", "battle of gibraltar attributed"),
        ("portrait-of-the-4th-duke-of-bedford", "portrait of the 4th duke of bedford"),
        ("Harvest (c. 1665/66), No. 2", "Harvest"),
        ("View of Delft, c.1660-1661", "View of Delft"),
        ("Spring in 1889", "Spring"),
        ("Plate 12: The Fall", "The Fall"),
        ("Composition VII", "Composition VII"),
        ("Self-Portrait with Halo", "Self-Portrait with Halo"),
        ("Cafe\u0301\x1b\n at  night", "Café at night"),
        ("", ""),
    ],
)
def test_a_title_loses_dates_numbers_and_what_is_left_of_a_file_name(title, cleaned):
    assert clean_title(title) == cleaned


def test_plain_text_is_one_line_of_composed_characters():
    assert plain("\ta\x00b \u200be\u0301\r\n") == "a b é"


def drawn(row=ROW, template=TEMPLATE, count=4000):
    return Counter(compose(row, template, random.Random(i)) for i in range(count))


def test_every_part_is_left_out_at_random_with_the_text_before_it():
    captions = drawn()
    assert set(captions) == {
        "Cubism by juan gris: the lamb", "by juan gris: the lamb", "Cubism: the lamb",
        "Cubism by juan gris", "Cubism", "by juan gris", "the lamb", "",
        "juan gris", *(", ".join(order) for order in ORDERS),
    }  # fmt: skip
    for word in ("Cubism", "juan", "lamb"):
        share = sum(n for caption, n in captions.items() if word in caption) / captions.total()
        assert share == pytest.approx(1 - PART_DROPOUT, abs=0.03)
    assert captions[""] / captions.total() == pytest.approx(PART_DROPOUT**3, abs=0.01)


PARTS = ("Cubism", "juan gris", "the lamb")
ORDERS = [(a, b) for a in PARTS for b in PARTS if a != b]
ORDERS += [(a, b, c) for a, b in ORDERS for c in PARTS if c not in (a, b)]


def test_phrasings_are_drawn_alike_and_a_row_may_lack_parts():
    captions = drawn({"style": "Cubism"}, "A {style} painting of {title} | {title} in {style}")
    assert set(captions) == {"A Cubism", "in Cubism", "Cubism", ""}
    assert captions["A Cubism"] == pytest.approx(captions["in Cubism"], rel=0.15)
    assert set(drawn({}, TEMPLATE, 50)) == {""}


def test_numbers_and_lists_of_texts_are_parts_too():
    row = {"year": 1914.0, "tags": ["a", "b"]}
    assert set(drawn(row, "{year}")) == {"1914", ""}
    assert set(drawn(row, "{tags}")) == {"a", "b", ""}


def captions(rows, **settings):
    return Captions([json.dumps(row) for row in rows], KINDS, DataConfig(**settings))


def test_a_caption_is_a_function_of_seed_step_and_picture():
    rows = [{"tags": [f"{i} {j}" for j in range(9)]} for i in range(40)]
    many = captions(rows, text_column="tags")
    together = many.captions_of(range(40), seed=3, step=5)
    assert together == [many.captions_of([i], 3, 5)[0] for i in range(40)]
    assert together == many.captions_of(torch.arange(40), 3, 5)
    assert together != many.captions_of(range(40), 3, 6)
    assert together != many.captions_of(range(40), 4, 5)


def test_texts_and_the_composed_caption_have_the_same_chance():
    row = {"text": " one\x07 ", "tags": ["two", "", "three"], "style": "Cubism"}
    both = captions([row], text_column=["text", "tags"], caption_template="{style}")
    found = Counter(both.captions_of([0], 0, step)[0] for step in range(4000))
    assert set(found) == {"one", "two", "three", "Cubism", ""}
    for text in ("one", "two", "three"):
        assert found[text] / 4000 == pytest.approx(0.25, abs=0.03)


def test_a_picture_of_which_nothing_is_known_has_an_empty_caption():
    assert captions([{}, {"text": None}, {"text": "  "}]).captions_of([0, 1, 2], 0, 0) == [""] * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text_column": "caption"}, r"text_column 'caption' is not in the data: the columns are"),
        ({"text_column": "year"}, r"text_column 'year' holds numbers"),
        ({"text_column": []}, r"has no captions for the text encoder: the columns are text, tags"),
        ({"caption_template": "{style} {genre}"}, r"names 'genre', which is not in the data"),
        ({"caption_template": "{style} {}"}, r"names '', which is not in the data"),
        ({"caption_template": "{style.x}"}, r"names 'style.x', which is not in the data"),
        ({"caption_template": "{style"}, r"columns are named in braces"),
        ({"caption_template": "{style} | plain"}, r"has a phrasing without a column"),
        ({"caption_template": "{style:>9}"}, r"formats .style., and columns"),
    ],
)
def test_what_cannot_be_a_caption_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        captions([{}], **settings)


# Sources.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of two styles; two captions each but for the first, which has none."""
    root = tmp_path / "paintings"
    root.mkdir()
    with open(root / "metadata.jsonl", "w") as file:
        for i in range(12):
            random_image(i).save(root / f"{i:02}.png")
            row = {"file_name": f"{i:02}.png", "style": ["Cubism", "Baroque"][i % 2], "year": i}
            captions = {"text": [f"a {i}", f"b {i}"]} if i else {}
            file.write(json.dumps(row | captions) + "\n")
    return root


def source(folder, **settings):
    return DataConfig(source=f"imagefolder:{folder}", resolution=8, holdout=0.3, **settings)


def all_captions(data, count=40):
    """Every caption of each picture, by the hash of its file."""
    draws = [data.captions.captions_of(range(len(data)), 0, step) for step in range(count)]
    return [set(texts) for texts in zip(*draws, strict=True)]


def test_a_folder_gives_its_captions_to_both_splits(folder):
    expected = [[""], *([f"a {i}", f"b {i}"] for i in range(1, 12))]
    found = []
    for split in ("train", "heldout"):
        data = load_data(source(folder), split, captions=True)
        found += all_captions(data)
        for texts, (label,) in zip(all_captions(data), data.labels.tolist(), strict=True):
            number = int(max(texts).split()[1]) if any(texts) else 0
            assert data.label_names["style"][label] == ["Cubism", "Baroque"][number % 2]
    assert sorted(map(sorted, found)) == sorted(expected)


def test_captions_that_repeat_are_no_labels_unless_no_encoder_reads_them(tmp_path):
    with open(tmp_path / "metadata.jsonl", "w") as file:
        for i in range(8):
            random_image(i).save(tmp_path / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "text": f"caption {i % 2}"}) + "\n")
    config = source(tmp_path)
    assert list(load_data(config, "all").label_names) == ["text"]
    assert list(load_data(config, "all", captions=True).label_names) == []


def test_the_art_set_composes_captions_of_its_labels():
    config = DataConfig(num_images=8, resolution=8, caption_template="{style} in {genre}")
    data = load_data(config, "all", captions=True)
    for texts, ids in zip(all_captions(data), data.labels.tolist(), strict=True):
        style, genre = (
            names[i].replace("_", " ")
            for names, i in zip(data.label_names.values(), ids, strict=True)
        )
        assert f"{style} in {genre}" in texts
        assert texts <= {f"{style} in {genre}", f"{style}, {genre}", f"{genre}, {style}",
                         style, f"in {genre}", genre, ""}  # fmt: skip


# Latents.


@pytest.fixture
def vae(tmp_path) -> str:
    torch.manual_seed(1)
    TinyAutoencoder(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    return str(tmp_path / "vae")


def latents(cache, **settings):
    return DataConfig(source=f"latents:{cache}", resolution=8, holdout=0.3, **settings)


def test_latents_have_the_captions_of_their_pictures(folder, vae, tmp_path):
    cache = encode(source(folder, vae=vae), tmp_path / "cache-a", part_size=5)
    for settings in ({}, {"caption_template": "{style} {year}"}, {"text_column": "style"}):
        for split in ("train", "heldout"):
            pixels = load_data(source(folder, **settings), split, captions=True)
            cached = load_training_data(latents(cache, **settings), split, captions=True)
            assert all_captions(cached) == all_captions(pixels)
            assert cached.captions.fingerprint == pixels.captions.fingerprint


def without_captions(cache):
    """A cache as earlier versions wrote it."""
    for name in (PLAN_FILE, CACHE_FILE):
        values = json.loads((cache / name).read_text())
        del values["known"]
        (cache / name).write_text(json.dumps(values))
    for part in (cache / "parts").iterdir():
        rows = datasets.Dataset.from_file(str(part)).remove_columns("known")
        table = rows.data.table.combine_chunks()
        with datasets.arrow_writer.ArrowWriter(path=f"{part}.new", features=rows.features) as file:
            file.write_table(table)
            file.finalize()
        Path(f"{part}.new").replace(part)


def test_a_cache_without_captions_stays_valid_and_is_continued(folder, vae, tmp_path):
    config, out = source(folder, vae=vae), tmp_path / "cache-b"
    cache = encode(config, out, part_size=5)
    before = load_training_data(latents(cache)).fingerprint
    without_captions(cache)
    (cache / CACHE_FILE).unlink()
    (cache / "parts" / "part-00001.arrow").unlink()
    encode(config, out, part_size=5)
    assert load_training_data(latents(cache)).fingerprint == before
    with pytest.raises(UserError, match="without captions, by an earlier version"):
        load_training_data(latents(cache), captions=True)


def test_changed_and_damaged_captions_of_a_cache_are_refused(folder, vae, tmp_path):
    cache = encode(source(folder, vae=vae), tmp_path / "cache-c")
    info = json.loads((cache / CACHE_FILE).read_text())
    info["known"]["sha256"] = "0" * 64
    (cache / CACHE_FILE).write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"captions in .* are damaged"):
        load_training_data(latents(cache), captions=True)
    table = folder / "metadata.jsonl"
    table.write_text(table.read_text().replace("a 3", "c 3"))
    with pytest.raises(UserError, match=r"begun with captions \w+ \(now"):
        encode(source(folder, vae=vae), cache)


def test_an_evaluation_composes_the_captions_of_the_training(folder, vae, tmp_path):
    cache = encode(source(folder, vae=vae), tmp_path / "cache-d")
    config = source_config(dataclasses.replace(latents(cache), caption_template="{style}"))
    assert config.caption_template == "{style}"
