"""Reading image files: formats, modes, orientation, crop, and damaged bytes."""

import contextlib
import io
import itertools
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from complexity_dit.evaluation.image_sets import folder_images
from complexity_dit.pictures import FORMATS, read_picture, square_pixels
from complexity_dit.pipelines.image_to_image import read_mask, read_pictures
from inl_core.run.errors import UserError
from support.pictures import encoded, random_image


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (12, 12), colour)


def transparent_palette() -> bytes:
    image = plain("P", 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    return encoded(image, transparency=1)


def animation() -> bytes:
    frames = [plain("RGB", (255, 0, 0))]
    return encoded(plain("RGB", (0, 0, 255)), "GIF", save_all=True, append_images=frames)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (encoded(plain("L", 77)), (77, 77, 77)),
        (encoded(plain("1", 1)), (255, 255, 255)),
        (encoded(plain("I;16", 77 * 256 + 200)), (77, 77, 77)),
        (encoded(plain("RGBA", (255, 0, 0, 0))), (255, 255, 255)),
        (encoded(plain("RGBA", (255, 0, 0, 51))), (255, 204, 204)),
        (encoded(plain("LA", (0, 0))), (255, 255, 255)),
        (transparent_palette(), (255, 255, 255)),
        (encoded(plain("CMYK", (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
        (animation(), (0, 0, 255)),
    ],
)
def test_every_mode_becomes_rgb(file: bytes, expected: tuple[int, int, int]) -> None:
    pixels = square_pixels(file, 4)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, 4, 4)
    assert {tuple(p) for p in pixels.reshape(3, -1).T.tolist()} == {expected}


def test_the_centre_is_cropped_and_scaled_without_aliasing() -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = np.indices((64, 64)).sum(0)[..., None] % 2 * 255  # a fine checkerboard
    pixels = square_pixels(encoded(Image.fromarray(wide)), 8)
    # The filter of the outermost columns includes a little of the black beyond the crop.
    assert np.abs(pixels[:, :, 1:-1].astype(int) - 127).max() <= 3


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 16, 8))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the upper half becomes the right one
    pixels = square_pixels(encoded(image, exif=exif), 4)
    assert (pixels[0] > 127).tolist() == [[False, False, True, True]] * 4


def test_a_picture_is_read_at_full_size_from_bytes_or_a_path(tmp_path) -> None:
    image = random_image(3, 80, 48)
    (tmp_path / "a.png").write_bytes(encoded(image))
    (tmp_path / "a.jpg").write_bytes(encoded(image, "JPEG"))
    for file in (tmp_path / "a.png", encoded(image)):
        assert read_picture(file).tobytes() == image.tobytes()
    assert read_picture(tmp_path / "a.jpg").size == (80, 48)
    assert read_picture(tmp_path / "a.jpg", 6).size == (40, 24)


def test_a_jpeg_shrunk_while_decoding_gives_nearly_the_same_pixels() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 640)[:, None, None], (640, 640, 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    jpeg = square_pixels(encoded(image, "JPEG", quality=95), 16).astype(int)
    png = square_pixels(encoded(image), 16).astype(int)
    assert np.abs(jpeg - png).max() <= 2


MODES = [
    "1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
    "I", "F", "I;16", "I;16B",
]  # fmt: skip
SIDE = 16


def in_mode(mode: str) -> Image.Image:
    """A square picture without symmetry, in one of Pillow's modes."""
    image = random_image(7, SIDE, SIDE).convert("RGBA")
    image.putalpha(random_image(8, SIDE, SIDE).convert("L"))
    if mode in ("I", "I;16", "I;16B"):
        values = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE))
        types = {"I": np.int32, "I;16": "<u2", "I;16B": ">u2"}
        return Image.fromarray(values.astype(types[mode]))
    if mode in ("LA", "La", "PA", "RGBa"):
        return image.convert("LA" if mode == "La" else mode).convert(mode)
    return image.convert("RGB").convert(mode)


def written(mode: str, kind: str, orientation: int) -> bytes | None:
    """The file, or None if Pillow does not write this mode or an orientation in this format."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation > 1 and kind in ("BMP", "GIF", "JPEG2000"):
        return None
    try:
        return encoded(in_mode(mode), kind, exif=exif)
    except (OSError, ValueError, KeyError):
        return None


def by_training(data: bytes) -> np.ndarray:
    return square_pixels(data, SIDE).transpose(1, 2, 0)


def by_pipeline(data: bytes) -> np.ndarray:
    pixels = read_pictures(Image.open(io.BytesIO(data)), None, None)
    return ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8)


def by_mask(data: bytes) -> np.ndarray:
    return read_mask(Image.open(io.BytesIO(data)), SIDE, SIDE)[0, 0].numpy() > 0


@pytest.mark.filterwarnings("ignore:Saving I mode")
@pytest.mark.parametrize(("mode", "kind"), list(itertools.product(MODES, FORMATS)))
def test_every_reader_gives_the_same_pixels(mode: str, kind: str, tmp_path) -> None:
    """For every mode and orientation that Pillow writes: in training, pipelines and evaluation."""
    read = []
    files = {o: data for o in range(1, 9) if (data := written(mode, kind, o)) is not None}
    for i, data in files.items():
        (tmp_path / f"{i}.png").write_bytes(data)
        (tmp_path / f"{i}b.png").write_bytes(data)
        try:
            expected = by_training(data)
        except UserError:
            with pytest.raises(UserError):
                by_pipeline(data)
            with pytest.raises(UserError):
                folder_images(tmp_path).read([0])
            continue
        np.testing.assert_array_equal(by_pipeline(data), expected)
        evaluated = folder_images(tmp_path)
        np.testing.assert_array_equal(evaluated.read([len(evaluated) - 1])[0], expected)
        grey = Image.fromarray(expected).convert("L")
        np.testing.assert_array_equal(by_mask(data), np.asarray(grey) >= 128)
        read.append(expected.tobytes())
    assert len(set(read)) == len(read)  # eight turns of one picture without symmetry


def test_transparent_sixteen_bit_grey_is_put_on_white() -> None:
    values = np.full((8, 8), 77 * 256, np.uint16)
    values[0, 0] = 5
    file = encoded(Image.fromarray(values), transparency=5)
    pixels = np.asarray(read_picture(file))
    assert pixels[0, 0].tolist() == [255] * 3
    assert (pixels[1:] == 77).all()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{} loop\n"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff"])
def test_postscript_is_refused_and_not_run(name, tmp_path, monkeypatch) -> None:
    def run(*_, **__):
        raise AssertionError("a program was started")

    for function in ("Popen", "run", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, function, run)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    for read in (read_picture, lambda path: square_pixels(path.read_bytes(), 8)):
        with pytest.raises(UserError, match="is not an image of a known format"):
            read(tmp_path / name)


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after them"])
def test_a_png_may_hold_megabytes_of_text(after: bool) -> None:
    image, about, exif = random_image(3, 8, 8), PngImagePlugin.PngInfo(), Image.Exif()
    exif[0x0112] = 3
    long = b"a" * 3_000_000
    about.add(b"zTXt", b"workflow\0\0" + zlib.compress(long), after)
    about.add(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(long), after)
    for _ in range(30):  # Pillow also bounds their sum
        about.add(b"tEXt", b"log\0" + long, after)
    file = encoded(image, pnginfo=about, exif=exif)
    assert read_picture(file).tobytes() == image.rotate(180).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_bytes_give_a_picture_or_one_error(kind: str) -> None:
    intact = encoded(random_image(3, 32, 32), kind)
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(intact)
        for position in rng.integers(0, len(broken), 4):
            broken[position] = rng.integers(0, 256)
        # Anything but a picture or a UserError fails the test.
        with contextlib.suppress(UserError):
            pixels = square_pixels(bytes(broken[: rng.integers(1, len(broken) + 1)]), 8)
            assert pixels.shape == (3, 8, 8)
