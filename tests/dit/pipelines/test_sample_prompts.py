"""`sample --prompt` and `--prompts FILE`."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from complexity_dit.config import SampleConfig
from complexity_dit.pipelines.sampling import iter_samples, sample, sample_settings
from inl_core.run.errors import UserError
from support.networks import generators

QUICK = SampleConfig(num_inference_steps=2, batch_size=3, chunk_size=2)
RIVER = "a river in winter"


@pytest.fixture
def folder(text_pipe, tmp_path):
    text_pipe.save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"\ufeff{RIVER}\r\n\n  a  portrait \n", encoding="utf-8")
    return str(file)


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_a_prompt_as_on_the_command_line(command, folder, text_pipe, tmp_path):
    out = tmp_path / "out"
    options = ("--num_inference_steps", 2, "--chunk_size", 1, "--num_images", 2)
    words = ("sample", folder, "--out", out, "--prompt", RIVER, "--labels.style", "Cubism")
    status, _, error = command(*words, *options)
    assert status == 0, error
    found = pictures(out)
    assert len(found) == 2
    labels = text_pipe.get_label_ids(style="Cubism").repeat(2, 1)
    config = SampleConfig(num_inference_steps=2, chunk_size=1)
    ((_, expected),) = iter_samples(text_pipe, labels, config, progress=False, prompts=[RIVER] * 2)
    assert np.array_equal(np.stack(list(found.values())), expected)
    alone = text_pipe(
        RIVER, style="Cubism", num_inference_steps=2, output_type="np", chunk_size=1,
        generator=generators(0),
    ).images  # fmt: skip
    assert not np.array_equal(alone[0], expected[0])  # the noise of (seed, image), not of the seed
    settings = json.loads((out / "settings.json").read_text())
    assert len(settings["prompts_sha256"]) == 64
    status, _, error = command(*words[:5], "a portrait", *words[6:], *options)
    assert status != 0
    assert "prompts_sha256" in error


def test_a_file_of_prompts_has_an_image_each_and_a_row_of_a_grid(folder, prompts, tmp_path):
    out = sample(folder, str(tmp_path / "set"), sampling=QUICK, prompts=prompts)
    found = pictures(out)
    assert len(found) == 2
    more = sample(folder, str(tmp_path / "more"), 5, sampling=QUICK, prompts=prompts)
    again = pictures(more)
    assert len(again) == 5
    assert all(np.array_equal(again[name], image) for name, image in found.items())
    one = sample(folder, str(tmp_path / "one"), 3, sampling=QUICK, prompt=RIVER)
    assert np.array_equal(pictures(one)["000002.png"], again["000002.png"])
    assert not np.array_equal(pictures(one)["000001.png"], again["000001.png"])
    sample(folder, str(tmp_path / "set.npz"), sampling=QUICK, prompts=prompts)
    with np.load(tmp_path / "set.npz") as archive:
        assert np.array_equal(archive["arr_0"], np.stack(list(found.values())))
    grid = sample(folder, str(tmp_path / "grid.png"), sampling=QUICK, prompts=prompts)
    with Image.open(grid) as image:
        assert image.height > 16  # two rows


def test_labels_beside_a_prompt_are_not_drawn(text_pipe):
    kept = sample_settings(text_pipe, text_pipe.get_label_ids(), QUICK, prompts=[RIVER])
    plain = sample_settings(text_pipe, text_pipe.get_label_ids(), QUICK)
    assert kept.keys() - plain.keys() == {"prompts_sha256"}
    assert kept["network_evaluations"] == 4  # two steps with guidance


def test_guidance_leads_away_from_a_negative_prompt(command, folder, text_pipe, tmp_path):
    words = ("sample", folder, "--prompt", RIVER, "--num_images", 2, "--num_inference_steps", 2)
    away = (*words, "--chunk_size", 1, "--negative_prompt", "a  portrait")
    status, _, error = command(*away, "--out", tmp_path / "out")
    assert status == 0, error
    found = pictures(tmp_path / "out")
    config = SampleConfig(num_inference_steps=2, chunk_size=1)
    labels = text_pipe.get_label_ids().expand(2, -1)

    def sampled(config):
        batches = iter_samples(text_pipe, labels, config, progress=False, prompts=[RIVER] * 2)
        return next(batches)[1]

    expected = sampled(dataclasses.replace(config, negative_prompt="a portrait"))
    assert np.array_equal(np.stack(list(found.values())), expected)
    assert not np.array_equal(expected, sampled(config))
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert kept["sample.negative_prompt"] == "a portrait"
    status, _, error = command(*words, "--chunk_size", 1, "--out", tmp_path / "out")
    assert status != 0
    assert "sample.negative_prompt" in error


def test_a_negative_prompt_that_would_do_nothing_is_refused(pipe, tmp_path):
    for off in ({"guidance_scale": 1.0}, {"autoguidance": "weaker"}):
        with pytest.raises(UserError, match="classifier-free guidance"):
            SampleConfig(negative_prompt="snow", **off)
    pipe.save_pretrained(tmp_path / "pipeline")
    config = dataclasses.replace(QUICK, negative_prompt="ukiyo e")
    with pytest.raises(UserError, match=r"--labels\.style Ukiyo_e"):
        sample(str(tmp_path / "pipeline"), str(tmp_path / "out"), sampling=config)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": "a", "prompts": "b"}, "exclude each other"),
        ({"prompts": "no-such.txt"}, r"no-such\.txt"),
        ({"prompt": "a\x00"}, r"U\+0000"),
    ],
)
def test_what_is_no_prompt_is_refused(folder, tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        sample(folder, str(tmp_path / "out"), sampling=QUICK, **given)
    assert not (tmp_path / "out").exists()


def test_files_without_prompts_are_refused(folder, tmp_path):
    file = tmp_path / "prompts.txt"
    for content, words in ((b"\n \n", "has no prompt"), (b"\xff\xfe", "is not UTF-8"),
                           (b"a\x1bb", r"U\+001B")):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(UserError, match=words):
            sample(folder, str(tmp_path / "out"), sampling=QUICK, prompts=str(file))


def test_a_pipeline_without_text_encoder_names_the_label(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"--labels\.style Ukiyo_e"):
        sample(str(tmp_path / "pipeline"), str(tmp_path / "out"), sampling=QUICK, prompt="ukiyo e")
