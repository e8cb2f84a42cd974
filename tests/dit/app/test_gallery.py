"""What the gallery paints, refuses and writes into its PNGs; no browser, no gradio."""

import io
import shlex
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from complexity_dit import __main__ as cli
from complexity_dit.app import gallery as gallery_module
from complexity_dit.app import gallery as gallery_png
from complexity_dit.app import page as app_page
from complexity_dit.app.gallery import Gallery, Settings
from complexity_dit.config import AppConfig, Limits, ObjectiveConfig
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.training.objective import build_scheduler
from inl_core.run.errors import UserError

# Solvers of the DPM family turn tensors into arrays in a way that numpy 2 warns about.
of_diffusers = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ASKED = Settings(labels={"style": "Fauvism"}, num_images=3, num_inference_steps=3, seed=7)


@pytest.fixture
def gallery(pipe) -> Gallery:
    return Gallery(pipe)


def painted(gallery: Gallery, settings: Settings) -> np.ndarray:
    *_, last = gallery.paint(settings)
    assert last.done
    return last.images


def test_the_same_settings_give_the_same_bits_and_others_do_not(gallery):
    first = painted(gallery, ASKED)
    assert first.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(first, painted(gallery, ASKED))
    for other in ({"seed": 8}, {"labels": {}}, {"guidance_scale": 5.0}, {"num_inference_steps": 4}):
        assert not np.array_equal(first, painted(gallery, replace(ASKED, **other))), other


@of_diffusers
def test_the_command_it_shows_paints_the_same_bits(gallery, tmp_path):
    scheduler = "DPMSolverMultistepScheduler"
    settings = gallery.check(replace(ASKED, scheduler=scheduler, side=12, num_images=5))
    gallery.pipe.save_pretrained(tmp_path / "pipeline")
    command = gallery_png.sample_command(gallery, settings, str(tmp_path / "pipeline"))
    words = shlex.split(command)
    words[words.index("pictures")] = str(tmp_path / "pictures")
    cli.run(words[1:])
    files = sorted((tmp_path / "pictures").glob("*.png"))
    there = np.stack([np.asarray(Image.open(file)) for file in files])
    np.testing.assert_array_equal(there, painted(gallery, settings))


def test_a_png_remembers_how_to_paint_it_again(gallery):
    images = painted(gallery, ASKED)
    settings = gallery.check(ASKED)
    data = gallery_png.picture_png(gallery, settings, images[2], 2)
    told = gallery_png.read_png(data)
    assert (told.settings, told.picture) == (settings, 2)
    assert told.pipeline_sha256 == gallery.pipeline_sha256
    assert told.versions["torch"] == torch.__version__.split("+")[0]
    again = painted(Gallery(gallery.pipe), told.settings)[told.picture]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), again)

    sheet = gallery_png.sheet_png(gallery, settings, images)
    told = gallery_png.read_png(sheet)
    assert told.picture is None
    assert gallery_png.sheet_png(gallery, told.settings, painted(gallery, told.settings)) == sheet


def test_other_pngs_are_refused():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="PNG")
    with pytest.raises(UserError, match="not of the gallery"):
        gallery_png.read_png(file.getvalue())
    with pytest.raises(UserError, match="not a PNG"):
        gallery_png.read_png(b"GIF89a")
    with pytest.raises(UserError, match="unknown field 'mood'"):
        Settings.from_dict({"mood": "blue"})
    text = PngInfo()
    text.add_itxt(gallery_png.CHUNK, '{"settings": {}, "picture": 0}')
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="PNG", pnginfo=text)
    with pytest.raises(UserError, match="not the gallery's: no pipeline_sha256"):
        gallery_png.read_png(file.getvalue())


def test_a_strip_differs_in_its_label_only(gallery):
    strip = replace(ASKED, labels={"style": "Cubism", "genre": "portrait"}, strip="style")
    assert gallery.check(strip).labels == {"genre": "portrait"}
    images = painted(gallery, strip)
    assert gallery.captions(strip) == ["Cubism", "Fauvism", "Ukiyo e"]
    for name, image in zip(("Cubism", "Fauvism", "Ukiyo_e"), images, strict=True):
        labels = {"style": name, "genre": "portrait"}
        alone = painted(gallery, replace(ASKED, labels=labels, num_images=1))[0]
        # another place in the network's batch: other rounding, at most one level
        assert np.abs(image.astype(int) - alone.astype(int)).max() <= 1
    assert not np.array_equal(images[0], images[1])
    assert gallery_png.sample_command(gallery, strip) is None


def test_denoising_is_shown_on_the_way(gallery, monkeypatch):
    monkeypatch.setattr(gallery_module, "PREVIEW_SECONDS", 0.0)
    shown = []
    gallery._paint(gallery.check(ASKED), threading.Event(), shown.append)
    assert [(frame.step, frame.done) for frame in shown] == [(1, False), (2, False)]
    # straight lines from noise to picture: the looks approach the end
    end = painted(gallery, ASKED).astype(float)
    away = [np.abs(frame.images - end).mean() for frame in shown]
    assert away[0] > away[1] > 0


def test_stop_ends_after_the_step(gallery):
    stop = threading.Event()
    stop.set()
    (frame,) = gallery.paint(replace(ASKED, num_inference_steps=50), stop)
    assert (frame.stopped, frame.done, frame.step) == (True, False, 1)


def test_a_page_that_is_closed_leaves_no_painter(gallery, monkeypatch):
    monkeypatch.setattr(gallery_module, "PREVIEW_SECONDS", 0.0)
    painting = gallery.paint(replace(ASKED, num_inference_steps=100))
    next(painting)
    painting.close()
    assert "painter" not in {thread.name for thread in threading.enumerate()}


def test_painting_changes_nothing_in_the_pipeline(gallery):
    scheduler = gallery.pipe.scheduler
    before = dict(vars(scheduler))
    painted(gallery, ASKED)
    painted(gallery, replace(ASKED, scheduler="UniPCMultistepScheduler"))
    assert gallery.pipe.scheduler is scheduler
    assert vars(scheduler).keys() == before.keys()
    assert torch.equal(scheduler.timesteps, before["timesteps"])


@of_diffusers
@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_every_scheduler_offered_gives_the_same_bits_twice(pipe, objective):
    kind = ObjectiveConfig(prediction_type=objective)
    names = {field: dict(enumerate(words)) for field, words in pipe.label_names.items()}
    gallery = Gallery(
        ComplexityDiTPipeline(pipe.transformer, build_scheduler(kind), id2label=names)
    )
    assert len(gallery.schedulers) >= 4
    for name in gallery.schedulers:
        settings = replace(ASKED, num_images=1, num_inference_steps=4, scheduler=name)
        np.testing.assert_array_equal(painted(gallery, settings), painted(gallery, settings), name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed -1 must be from 0"),
        ({"seed": None}, "seed None must be a whole number"),
        ({"num_images": 33}, "pictures 33 must be from 1 to 32.*--max_images"),
        ({"num_inference_steps": 101}, "steps 101 must be from 1 to 100.*--max_steps"),
        ({"num_inference_steps": 2.5}, "steps 2.5 must be a whole number"),
        ({"side": 514}, "size 514 must be from 2 to 512.*--max_side"),
        ({"side": 9}, "size 9 must be a multiple of 2: take 8 or 10"),
        ({"guidance_scale": float("nan")}, "guidance nan"),
        ({"guidance_scale": 21.0}, "guidance 21 must be from 0 to 20"),
        ({"scheduler": "DDPMScheduler"}, "'DDPMScheduler' must be one of FlowMatch"),
        ({"scheduler": "../../etc"}, "must be one of"),
        ({"labels": {"style": "Fauvizm"}}, "near: 'Fauvism'"),
        ({"labels": {"mood": "blue"}}, "unknown label field 'mood'"),
        ({"strip": "mood"}, "label fields are style, genre"),
        ({"chunk_size": 0}, "chunk_size 0"),
    ],
)
def test_what_cannot_be_painted_is_refused(gallery, wrong, message):
    with pytest.raises(UserError, match=message):
        next(gallery.paint(replace(ASKED, **wrong)))


def test_limits_are_the_servers(pipe):
    config = AppConfig(max_images=2, max_steps=5)
    gallery = Gallery(pipe, config.limits)
    with pytest.raises(UserError, match=r"has 3 pictures.*at most 2.*--max_images 3"):
        gallery.check(replace(ASKED, num_images=2, strip="style", chunk_size=2))
    with pytest.raises(UserError, match="steps 6 must be from 1 to 5"):
        gallery.check(replace(ASKED, num_images=2, num_inference_steps=6))
    for wrong in ({"port": 0}, {"queue_size": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AppConfig(**wrong)
    with pytest.raises(UserError, match="max_steps 0"):
        Limits(max_steps=0)


def test_broken_weights_are_named_not_painted(gallery):
    with torch.no_grad():
        gallery.pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        list(gallery.paint(ASKED))


def test_the_page_escapes_what_labels_and_errors_say(pipe):
    evil = "<script>alert(1)</script>"
    names = {"style": {0: evil, 1: "b", 2: "c"}, "genre": {0: "d", 1: "e"}}
    gallery = Gallery(ComplexityDiTPipeline(pipe.transformer, pipe.scheduler, id2label=names))
    settings = gallery.check(replace(ASKED, labels={"style": evil}, num_images=1))
    (*_, frame) = gallery.paint(settings)
    strip = gallery.check(replace(settings, strip="style"))
    (*_, frames) = gallery.paint(strip)
    texts = [
        app_page.wall(gallery, settings, frame),
        app_page.wall(gallery, strip, frames),
        app_page.refusal(evil),
        app_page.masthead(gallery),
    ]
    for text in texts:
        assert "<script" not in text
    name = app_page.file_name(settings, "../x")
    assert "/" not in name
    assert ".." not in name
