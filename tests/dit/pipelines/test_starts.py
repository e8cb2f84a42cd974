"""`sample` from pictures, with a mask, and from one image to another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from complexity_dit.config import SampleConfig, StartConfig
from complexity_dit.pipelines.image_to_image import ComplexityDiTImg2ImgPipeline
from complexity_dit.pipelines.sampling import load_pipeline, sample
from complexity_dit.seeding import generator_for
from inl_core.run.errors import UserError
from support.pictures import encoded, random_image, write_folder

QUICK = SampleConfig(num_inference_steps=4, batch_size=8, chunk_size=4, guidance_scale=1.0)


@pytest.fixture
def source(counted_pipe, tmp_path) -> str:
    counted_pipe.save_pretrained(tmp_path / "pipe")
    return str(tmp_path / "pipe")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures of 8 x 12 pixels, and what does not count."""
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3)).astype(np.uint8)
    folder = write_folder(tmp_path / "pictures", images)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def array(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_images_start_from_the_pictures_of_a_folder(source, folder, tmp_path):
    start = StartConfig(image=str(folder), strength=0.5)
    labels = {"style": ["Cubism", "Fauvism"]}
    sample(source, str(tmp_path / "out"), labels=labels, sampling=QUICK, start=start)
    assert sorted(pngs(tmp_path / "out")) == [f"{i:06d}.png" for i in range(6)]
    pipe = ComplexityDiTImg2ImgPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    for i in range(6):  # both styles of a picture follow each other
        with Image.open(folder / f"{i // 2:04d}.png") as whole:
            middle = whole.crop((2, 0, 10, 8))
        one = pipe(
            image=middle, strength=0.5, style=i % 2, generator=generator_for(0, "sample", i),
            num_inference_steps=4, guidance_scale=1.0, chunk_size=4, chunk_offset=i % 4,
            output_type="np",
        ).images[0]  # fmt: skip
        assert np.array_equal((one * 255).round(), array(tmp_path / f"out/{i:06d}.png"))


def test_a_folder_from_pictures_is_completed_and_never_mixed(source, folder, tmp_path, capsys):
    start, out = StartConfig(image=str(folder)), tmp_path / "out"
    sample(source, str(out), 5, sampling=QUICK, start=start)
    first = pngs(out)
    (out / "000003.png").unlink()
    sample(source, str(out), 5, sampling=replace(QUICK, batch_size=1), start=start)
    assert pngs(out) == first
    assert "wrote 1 images" in capsys.readouterr().out
    other = replace(start, strength=0.9)
    with pytest.raises(UserError, match=r"other settings \(.*strength"):
        sample(source, str(out), 5, sampling=QUICK, start=other)
    with pytest.raises(UserError, match=r"other settings \(.*images_sha256"):
        sample(source, str(out), 5, sampling=QUICK)
    Image.new("RGB", (8, 8), "red").save(folder / "0001.png")
    with pytest.raises(UserError, match=r"other settings \(images_sha256\)"):
        sample(source, str(out), 5, sampling=QUICK, start=start)
    assert pngs(out) == first


def test_black_of_a_mask_is_kept(source, tmp_path):
    picture, mask = random_image(1, 8, 8), Image.new("L", (8, 8), 0)
    mask.paste(255, (4, 0, 8, 8))
    picture.save(tmp_path / "a.png")
    mask.save(tmp_path / "mask.png")
    start = StartConfig(image=str(tmp_path / "a.png"), mask=str(tmp_path / "mask.png"))
    sample(source, str(tmp_path / "out"), 2, sampling=QUICK, start=start)
    for i in range(2):
        made = array(tmp_path / f"out/{i:06d}.png")
        assert np.array_equal(made[:, :4], np.asarray(picture)[:, :4])
        assert not np.array_equal(made[:, 4:], np.asarray(picture)[:, 4:])


def test_pictures_are_read_as_in_training(source, tmp_path):
    """Upright by EXIF; a picture of another size is cut and scaled, also to a larger side."""
    upright = random_image(2, 6, 4)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    (tmp_path / "turned.png").write_bytes(
        encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=turned.tobytes())
    )
    upright.save(tmp_path / "upright.png")
    for name in ("turned", "upright"):
        start = StartConfig(image=str(tmp_path / f"{name}.png"), strength=0.0)
        sample(source, str(tmp_path / name), sampling=QUICK, start=start)
    assert np.array_equal(*(array(tmp_path / n / "000000.png") for n in ("turned", "upright")))


def test_labels_that_are_not_named_are_left_out_of_a_change(source, tmp_path):
    random_image(1, 8, 8).save(tmp_path / "a.png")
    start = StartConfig(image=str(tmp_path / "a.png"), strength=1.0)
    sample(source, str(tmp_path / "out"), 3, sampling=QUICK, start=start)
    pipe = load_pipeline(source)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(
        class_labels=[[-1, -1]] * 3, generator=[generator_for(0, "sample", i) for i in range(3)],
        num_inference_steps=4, guidance_scale=1.0, chunk_size=4, output_type="np",
    ).images  # fmt: skip
    for i in range(3):
        made = array(tmp_path / f"out/{i:06d}.png")
        assert np.abs(made - (plain[i] * 255).round()).max() <= 1


def test_a_strip_goes_from_one_image_to_another(source, tmp_path):
    way = StartConfig(interpolate=True, to_seed=5)
    labels = {"style": ["Cubism", "Fauvism"], "genre": ["portrait"]}
    sample(source, str(tmp_path / "way"), 4, labels, QUICK, start=way)
    ends = [(0, "Cubism", "000000.png"), (5, "Fauvism", "000003.png")]
    for seed, style, name in ends:
        named = {"style": [style], "genre": ["portrait"]}
        alone = tmp_path / f"alone-{seed}"
        sample(source, str(alone), 1, named, replace(QUICK, seed=seed))
        # Another position in the network's batch: rounding differs by at most one level.
        assert np.abs(array(alone / "000000.png") - array(tmp_path / "way" / name)).max() <= 1
    images = [array(file) for file in sorted((tmp_path / "way").glob("*.png"))]
    assert len({image.tobytes() for image in images}) == 4
    sample(source, str(tmp_path / "again"), 4, labels, replace(QUICK, batch_size=1), start=way)
    assert pngs(tmp_path / "again") == pngs(tmp_path / "way")
    sample(source, str(tmp_path / "strip.png"), labels=labels, sampling=QUICK, start=way)
    assert (tmp_path / "strip.png").is_file()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": "m.png"}, r"mask m\.png needs --image"),
        ({"strength": 0.5}, "strength 0.5 needs --image"),
        ({"to_seed": 1}, "to_seed 1 needs --interpolate"),
        ({"image": "a.png", "strength": 1.5}, "strength is 1.5"),
        ({"image": "a.png", "interpolate": True}, "exclude each other"),
    ],
)
def test_options_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        StartConfig(**fields)


def test_wrong_pictures_and_strips_are_refused(source, folder, tmp_path):
    def refused(message, start, labels=None, out="out", count=None):
        with pytest.raises(UserError, match=message):
            sample(source, str(tmp_path / out), count, labels, QUICK, start=start)

    refused("neither a picture nor a folder", StartConfig(image=str(tmp_path / "nothing")))
    refused("is the folder of --image", StartConfig(image=str(folder)), out="pictures")
    Image.new("L", (9, 9)).save(tmp_path / "mask.png")
    masked = StartConfig(image=str(folder), mask=str(tmp_path / "mask.png"))
    refused(r"mask\.png is 9x9 and .*0000\.png is 12x8", masked)
    (folder / "0002.png").write_bytes(b"rubbish")
    refused(r"--image .*0002\.png is not an image", StartConfig(image=str(folder)))
    assert not pngs(tmp_path / "out")
    way = StartConfig(interpolate=True)
    refused(
        "both ends of the strip are the same", way, {"style": ["Cubism"], "genre": ["portrait"]}
    )
    refused("not over 3", way, {"style": ["0", "1", "2"]})
    refused("num_images 1 must be at least 2", way, {"style": ["0", "1"]}, count=1)


def test_the_command_takes_the_options(command, source, folder, tmp_path):
    out = tmp_path / "out.npz"
    status, printed, error = command(
        "sample", source, "--out", out, "--image", folder, "--strength", 0.25,
        "--num_inference_steps", 4,
    )  # fmt: skip
    assert status == 0, error
    assert "wrote 3 images" in printed
    assert np.load(out)["arr_0"].shape == (3, 8, 8, 3)
    status, _, error = command("sample", source, "--out", out, "--mask", "m.png")
    assert status == 2
    assert "needs --image" in error
