"""Reading image files: modes, orientation, crop, and damaged bytes."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from complexity_dit.data.pictures import read_picture, square_pixels
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
