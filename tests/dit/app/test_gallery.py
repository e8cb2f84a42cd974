"""Sampling, limits and PNGs of the gallery, without gradio or a browser."""

import base64
import io
import json
import shlex
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from complexity_dit import __main__ as cli
from complexity_dit.app import gallery as gallery_module
from complexity_dit.app import page
from complexity_dit.app.gallery import (
    CHUNK,
    Gallery,
    Settings,
    picture_png,
    sample_command,
    sheet_png,
)
from complexity_dit.config import AppConfig, Limits, ObjectiveConfig
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.seeding import generator_for
from complexity_dit.training.objective import build_scheduler
from inl_core.run.errors import UserError
from support.networks import small_network
from support.pictures import encoded

# Solvers of the DPM family convert tensors to arrays in a way that numpy 2 warns about.
uses_dpm_solvers = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ASKED = Settings(labels={"style": "Fauvism"}, num_images=3, num_inference_steps=3, seed=7)


@pytest.fixture
def gallery(pipe) -> Gallery:
    return Gallery(pipe)


def final_images(gallery: Gallery, settings: Settings) -> np.ndarray:
    *_, last = gallery.paint(settings)
    assert last.done
    return last.images


def test_equal_settings_give_equal_bits_and_others_do_not(gallery):
    first = final_images(gallery, ASKED)
    assert first.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(first, final_images(gallery, ASKED))
    for other in ({"seed": 8}, {"labels": {}}, {"guidance_scale": 5.0}, {"num_inference_steps": 4}):
        assert not np.array_equal(first, final_images(gallery, replace(ASKED, **other))), other


@uses_dpm_solvers
def test_the_command_on_the_page_samples_the_same_bits(gallery, tmp_path):
    scheduler = "DPMSolverMultistepScheduler"
    settings = gallery.check(replace(ASKED, scheduler=scheduler, side=12, num_images=5))
    gallery.pipe.save_pretrained(tmp_path / "pipeline")
    painted_by_command(gallery, settings, final_images(gallery, settings), tmp_path)


def test_internal_guidance_is_in_pictures_and_command(pipe):
    config = pipe.transformer.config
    network = type(pipe.transformer).from_config(config, auxiliary_layer=1).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    gallery = Gallery(ComplexityDiTPipeline(network, pipe.scheduler, id2label=pipe.id2label))
    on = replace(ASKED, internal_guidance_scale=2.0)
    assert not np.array_equal(final_images(gallery, on), final_images(gallery, ASKED))
    assert "--internal_guidance_scale 2.0" in sample_command(gallery, on)
    assert "internal" not in sample_command(gallery, ASKED)
    with pytest.raises(UserError, match=r"internal guidance 21\.0 must be a number from 0 to 20"):
        gallery.check(replace(on, internal_guidance_scale=21.0))


def test_the_gallery_takes_the_guidance_of_its_pipeline(pipe):
    pipe.guidance = {"guidance_scale": 19.0, "guidance_interval": (0.95, 1.0)}
    gallery = Gallery(pipe)
    settings = gallery.check(ASKED)
    assert (settings.guidance_scale, settings.internal_guidance_scale) == (19.0, 1.0)
    assert "guidance" not in sample_command(gallery, settings)
    other = gallery.check(replace(ASKED, guidance_scale=2.0))
    assert "--guidance_scale 2.0" in sample_command(gallery, other)
    images = final_images(gallery, ASKED)
    assert not np.array_equal(images, final_images(gallery, other))
    pipe.guidance = {"guidance_scale": 19.0}
    assert not np.array_equal(images, final_images(Gallery(pipe), ASKED))


@pytest.mark.parametrize("picture", [2, None], ids=["picture", "sheet"])
def test_a_png_holds_the_settings_that_reproduce_it(gallery, picture):
    def png(settings: Settings) -> bytes:
        images = final_images(gallery, settings)
        if picture is None:
            return sheet_png(gallery, settings, images)
        return picture_png(gallery, settings, images[picture], picture)

    settings = gallery.check(ASKED)
    data = png(settings)
    content = json.loads(Image.open(io.BytesIO(data)).text[CHUNK])
    assert (Settings(**content["settings"]), content["picture"]) == (settings, picture)
    assert content["pipeline_sha256"] == gallery.pipeline_sha256
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert png(Settings(**content["settings"])) == data


def test_a_strip_differs_only_in_its_label(gallery):
    strip = replace(ASKED, labels={"style": "Cubism", "genre": "portrait"}, strip="style")
    assert gallery.check(strip).labels == {"genre": "portrait"}
    images = final_images(gallery, strip)
    assert gallery.captions(strip) == ["Cubism", "Fauvism", "Ukiyo e"]
    for name, image in zip(("Cubism", "Fauvism", "Ukiyo_e"), images, strict=True):
        labels = {"style": name, "genre": "portrait"}
        alone = final_images(gallery, replace(ASKED, labels=labels, num_images=1))[0]
        # Another position in the network's batch: rounding differs by at most one level.
        assert np.abs(image.astype(int) - alone.astype(int)).max() <= 1
    assert not np.array_equal(images[0], images[1])
    assert sample_command(gallery, strip) is None


def test_labels_that_are_left_open_are_those_of_training_pictures(counted_pipe, gallery, tmp_path):
    counted = Gallery(counted_pipe)
    assert {tuple(counted.labels_of(seed).items()) for seed in range(40)} == {
        (("style", "Cubism"), ("genre", "landscape")), (("style", "Cubism"), ("genre", "portrait")),
        (("style", "Fauvism"), ("genre", "portrait")), (("style", "Ukiyo_e"),),
    }  # fmt: skip
    assert gallery.labels_of(0) == {}
    settings = counted.check(replace(ASKED, labels={}, num_images=5))
    images = final_images(counted, settings)
    first = replace(settings, labels=counted.labels_of(settings.seed))
    assert np.array_equal(final_images(counted, first)[0], images[0])
    counted.pipe.save_pretrained(tmp_path / "pipeline")
    painted_by_command(counted, settings, images, tmp_path)


def painted_by_command(gallery, settings, images, folder):
    words = shlex.split(sample_command(gallery, settings, str(folder / "pipeline")))
    words[words.index("pictures")] = str(folder / "pictures")
    cli.run(words[1:])
    files = sorted((folder / "pictures").glob("*.png"))
    np.testing.assert_array_equal(
        np.stack([np.asarray(Image.open(file)) for file in files]), images
    )


def test_a_strip_between_two_images_is_that_of_the_command(gallery, tmp_path):
    settings = gallery.check(replace(ASKED, to_labels={"style": "Cubism"}, to_seed=9, num_images=5))
    images = final_images(gallery, settings)
    assert len(images) == 5
    gallery.pipe.save_pretrained(tmp_path / "pipeline")
    painted_by_command(gallery, settings, images, tmp_path)
    assert sample_command(gallery, replace(settings, to_labels={"genre": "portrait"})) is None


def test_a_picture_is_changed_where_the_mask_is_white(gallery):
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = base64.b64encode(encoded(Image.fromarray(values))).decode()
    mask = Image.new("L", (8, 8))
    mask.paste(255, (4, 0, 8, 8))
    whole = gallery.check(replace(ASKED, image=picture, strength=0.0))
    assert (final_images(gallery, whole) == values).all()
    mask_text = base64.b64encode(encoded(mask)).decode()
    part = gallery.check(replace(ASKED, image=picture, mask=mask_text, strength=1.0))
    images = final_images(gallery, part)
    assert (images[:, :, :4] == values[:, :4]).all()
    assert not (images[:, :, 4:] == values[:, 4:]).all()
    assert sample_command(gallery, part) is None
    # The settings in a PNG are whole: its picture and mask are in them.
    content = json.loads(
        Image.open(io.BytesIO(picture_png(gallery, part, images[0], 0))).text[CHUNK]
    )
    assert Settings(**content["settings"]) == part
    assert gallery.check(part) == part
    wide = base64.b64encode(encoded(Image.new("RGB", (513, 4)))).decode()
    with pytest.raises(UserError, match=r"image cannot be read .*at most 512 px"):
        gallery.check(replace(ASKED, image=wide))


def test_previews_approach_the_result(gallery, monkeypatch):
    monkeypatch.setattr(gallery_module, "PREVIEW_SECONDS", 0.0)
    previews = []
    gallery._paint(gallery.check(ASKED), threading.Event(), previews.append)
    assert [(frame.step, frame.done) for frame in previews] == [(1, False), (2, False)]
    result = final_images(gallery, ASKED).astype(float)
    distances = [np.abs(frame.images - result).mean() for frame in previews]
    assert distances[0] > distances[1] > 0
    # They are the predicted clean picture, which after the first of three steps is no longer noise.
    noise = gallery.pipe(
        style="Fauvism", num_images_per_prompt=3,
        generator=[generator_for(7, "sample", i) for i in range(3)],
        num_inference_steps=3, chunk_size=4, output_type="np",
        callback_on_step_end=lambda pipe, *_: setattr(pipe, "_interrupt", True) or {},
    ).images  # fmt: skip
    assert np.abs(255 * noise - result).mean() > distances[0]


def test_closing_the_iterator_ends_the_sampling(gallery, monkeypatch):
    monkeypatch.setattr(gallery_module, "PREVIEW_SECONDS", 0.0)
    painting = gallery.paint(replace(ASKED, num_inference_steps=100))
    assert next(painting).step < 100
    (painter,) = [thread for thread in threading.enumerate() if thread.name == "painter"]
    painting.close()
    painter.join(timeout=10)
    assert not painter.is_alive()


def test_sampling_does_not_change_the_pipeline(gallery):
    scheduler = gallery.pipe.scheduler
    before = dict(vars(scheduler))
    final_images(gallery, ASKED)
    final_images(gallery, replace(ASKED, scheduler="UniPCMultistepScheduler"))
    assert gallery.pipe.scheduler is scheduler
    assert vars(scheduler).keys() == before.keys()
    assert torch.equal(scheduler.timesteps, before["timesteps"])


@uses_dpm_solvers
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # in diffusers' DEIS
@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_every_scheduler_on_offer_is_deterministic(pipe, objective):
    kind = ObjectiveConfig(prediction_type=objective)
    names = {field: dict(enumerate(words)) for field, words in pipe.label_names.items()}
    gallery = Gallery(
        ComplexityDiTPipeline(pipe.transformer, build_scheduler(kind), id2label=names)
    )
    assert len(gallery.schedulers) >= 4
    for name in gallery.schedulers:
        settings = replace(ASKED, num_images=1, num_inference_steps=4, scheduler=name)
        np.testing.assert_array_equal(
            final_images(gallery, settings), final_images(gallery, settings), name
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed -1 must be a whole number from 0"),
        ({"seed": None}, "seed None must be a whole number"),
        ({"num_images": 33}, "pictures 33 must be a whole number from 1 to 32.*--max_images"),
        (
            {"num_inference_steps": 101},
            "steps 101 must be a whole number from 1 to 100.*--max_steps",
        ),
        ({"num_inference_steps": 2.5}, "steps 2.5 must be a whole number"),
        ({"side": 514}, "size 514 must be a whole number from 2 to 512.*--max_side"),
        ({"side": 9}, "size 9 must be a multiple of 2: take 8 or 10"),
        ({"guidance_scale": float("nan")}, "guidance nan"),
        ({"guidance_scale": 21.0}, "guidance 21.0 must be a number from 0 to 20"),
        ({"scheduler": "DDPMScheduler"}, "'DDPMScheduler' must be one of FlowMatch"),
        ({"scheduler": "../../etc"}, "must be one of"),
        ({"labels": {"style": "Fauvizm"}}, "near: 'Fauvism'"),
        ({"labels": {"mood": "blue"}}, "unknown label field 'mood'"),
        ({"strip": "mood"}, "'mood' must be a label field: style, genre"),
        ({"chunk_size": 0}, "chunk_size 0"),
        ({"strength": 1.5}, "strength 1.5 must be a number from 0 to 1"),
        ({"to_labels": {"style": "Fauvizm"}}, "near: 'Fauvism'"),
        ({"to_labels": {}, "to_seed": -1}, "last seed -1 must be a whole number"),
        ({"to_labels": {}, "strip": "style"}, "exclude each other"),
        ({"mask": "abcd"}, "a mask needs an image"),
        ({"image": ""}, "there is no image yet"),
        ({"image": "no base64!"}, "the image cannot be read"),
        ({"image": "aaaa"}, "expected a PNG of at most 512 px"),
    ],
)
def test_invalid_settings_are_refused(gallery, wrong, message):
    with pytest.raises(UserError, match=message):
        next(gallery.paint(replace(ASKED, **wrong)))


def test_the_server_enforces_its_limits(pipe):
    config = AppConfig(max_images=2, max_steps=5)
    gallery = Gallery(pipe, config.limits)
    with pytest.raises(UserError, match=r"has 3 pictures.*at most 2.*--max_images 3"):
        gallery.check(replace(ASKED, num_images=2, strip="style", chunk_size=2))
    with pytest.raises(UserError, match="steps 6 must be a whole number from 1 to 5"):
        gallery.check(replace(ASKED, num_images=2, num_inference_steps=6))
    for wrong in ({"port": 0}, {"queue_size": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AppConfig(**wrong)
    with pytest.raises(UserError, match="max_steps is 0"):
        Limits(max_steps=0)


def test_broken_weights_raise(gallery):
    with torch.no_grad():
        gallery.pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        list(gallery.paint(ASKED))


def test_labels_and_errors_are_escaped(pipe):
    evil = "<script>alert(1)</script>"
    names = {"style": {0: evil, 1: "b", 2: "c"}, "genre": {0: "d", 1: "e"}}
    gallery = Gallery(ComplexityDiTPipeline(pipe.transformer, pipe.scheduler, id2label=names))
    settings = gallery.check(replace(ASKED, labels={"style": evil}, num_images=1))
    (*_, frame) = gallery.paint(settings)
    strip = gallery.check(replace(settings, strip="style"))
    (*_, frames) = gallery.paint(strip)
    texts = [
        page.wall(gallery, settings, frame),
        page.wall(gallery, strip, frames),
        page.refusal(evil),
        page.masthead(gallery),
    ]
    for text in texts:
        assert "<script" not in text
    name = page.file_name(settings, "../x")
    assert "/" not in name
    assert ".." not in name


def test_a_prompt_is_painted_and_in_png_and_command(text_pipe, tmp_path):
    gallery = Gallery(text_pipe)
    asked = replace(ASKED, prompt=" a river  in winter\n")
    settings = gallery.check(asked)
    assert settings.prompt == "a river in winter"
    images = final_images(gallery, settings)
    assert not np.array_equal(images, final_images(gallery, ASKED))
    png = Image.open(io.BytesIO(picture_png(gallery, settings, images[0], 0)))
    assert json.loads(png.text[CHUNK])["settings"]["prompt"] == settings.prompt
    assert page.file_name(settings) == "gallery-a-river-in-winter-Fauvism-seed-7.png"
    text_pipe.save_pretrained(tmp_path / "pipeline")
    painted_by_command(gallery, settings, images, tmp_path)
    picture = base64.b64encode(encoded(Image.new("RGB", (8, 8)))).decode()
    for other in ({"strip": "style"}, {"to_labels": {"style": "Cubism"}}, {"image": picture}):
        one, two = (replace(ASKED, prompt=words, **other) for words in ("a river", "a portrait"))
        assert not np.array_equal(final_images(gallery, one), final_images(gallery, two)), other


def test_a_page_for_prompts_alone_speaks_of_no_labels(text_pipe):
    network = small_network(caption_channels=16, label_fields=[], num_classes=[])
    parts = {"tokenizer": text_pipe.tokenizer, "text_encoder": text_pipe.text_encoder}
    pipe = ComplexityDiTPipeline(network, text_pipe.scheduler, prompt_length=8, **parts)
    gallery = Gallery(pipe)
    assert "· prompts<" in page.masthead(gallery)
    assert "· prompts, 3 of style, 2 of genre<" in page.masthead(Gallery(text_pipe))
    for changes, words in (
        ({}, "<b>no prompt</b> · seed 7"),
        ({"prompt": "a river", "to_labels": {}, "to_seed": 9}, "<b>a river</b> · seed 7 → 9"),
    ):
        settings = gallery.check(replace(ASKED, labels={}, **changes))
        *_, frame = gallery.paint(settings)
        assert words in page.wall(gallery, settings, frame)


def test_prompts_that_cannot_be_read_are_refused(text_pipe, gallery):
    for prompt, words in (("a\x00", r"U\+0000"), ("a" * 2001, "at most 2000")):
        with pytest.raises(UserError, match=words):
            Gallery(text_pipe).check(replace(ASKED, prompt=prompt))
    with pytest.raises(UserError, match="style='Cubism'"):
        gallery.check(replace(ASKED, prompt="Cubism"))


def test_the_chips_are_the_names_of_all_labels(gallery):
    gallery.label_names["style"][0] = "<b>_Cubism"
    found = page.chips(gallery)
    assert found.count("<button") == 5
    assert ">&lt;b&gt; Cubism</button>" in found
