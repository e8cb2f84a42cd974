"""Every kind of image file becomes a square RGB picture or one clear error."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from complexity_dit.data.pictures import square_pixels
from inl_core.run.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(side: int) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (12, 12), colour)


def palette_with_hole() -> bytes:
    image = plain("P", 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    return encoded(image, transparency=1)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (encoded(plain("L", 77)), (77, 77, 77)),
        (encoded(plain("1", 1)), (255, 255, 255)),
        (encoded(plain("I;16", 77 * 256 + 200)), (77, 77, 77)),
        (encoded(plain("RGBA", (255, 0, 0, 0))), (255, 255, 255)),
        (encoded(plain("RGBA", (255, 0, 0, 51))), (255, 204, 204)),
        (encoded(plain("LA", (0, 0))), (255, 255, 255)),
        (palette_with_hole(), (255, 255, 255)),
        (encoded(plain("CMYK", (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
        (
            encoded(
                plain("RGB", (0, 0, 255)),
                "GIF",
                save_all=True,
                append_images=[plain("RGB", (255, 0, 0))],
            ),
            (0, 0, 255),
        ),
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
    # The outermost columns also see, as they should, a little of the black beyond the crop.
    assert np.abs(pixels[:, :, 1:-1].astype(int) - 127).max() <= 3


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 16, 8))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: the upper half becomes the right one
    pixels = square_pixels(encoded(image, exif=exif), 4)
    assert (pixels[0] > 127).tolist() == [[False, False, True, True]] * 4


def test_a_large_jpeg_shrunk_while_decoding_looks_the_same() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 640)[:, None, None], (640, 640, 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    jpeg = square_pixels(encoded(image, "JPEG", quality=95), 16).astype(int)
    png = square_pixels(encoded(image), 16).astype(int)
    assert np.abs(jpeg - png).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_bytes_give_a_picture_or_one_error(kind: str) -> None:
    whole = encoded(noise(32), kind)
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole)
        for position in rng.integers(0, len(broken), 4):
            broken[position] = rng.integers(0, 256)
        # Anything but a picture or a UserError fails the test.
        with contextlib.suppress(UserError):
            pixels = square_pixels(bytes(broken[: rng.integers(1, len(broken) + 1)]), 8)
            assert pixels.shape == (3, 8, 8)
