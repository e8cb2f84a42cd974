"""From the bytes of any image file to a square RGB picture, or a sentence about what is wrong."""

import contextlib
import warnings
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from inl_core.run.errors import UserError

VERSION = 1
"""Part of every cache key and fingerprint: raise it when ``square_pixels`` changes its output."""


def square_pixels(data: bytes, resolution: int) -> np.ndarray:
    """Decode an image file into a square picture.

    Animations give their first frame; transparency goes over white; grey, palette and CMYK become
    RGB; 16-bit grey keeps its high byte; embedded colour profiles are not applied. The largest
    centred square is then scaled with an antialiased Lanczos filter.

    Args:
        data: The bytes of the file.
        resolution: Side of the result in pixels.

    Returns:
        uint8 of shape (3, resolution, resolution), RGB.

    Raises:
        UserError: The bytes are no picture Pillow can read whole, the picture is over its
            decompression-bomb limit, or a side is smaller than ``resolution``.
    """
    with bombs_refused():
        try:
            image = Image.open(BytesIO(data))
            width, height = image.size
            if min(width, height) < resolution:
                raise UserError(
                    f"{width}×{height} pixels, smaller than the crop of {resolution}×{resolution}"
                )
            # JPEG can shrink by 2, 4 or 8 while decoding; stay at twice the size we need.
            scale = 2 * resolution / min(width, height)
            image.draft(None, (int(width * scale) + 1, int(height * scale) + 1))
            rgb = _to_rgb(ImageOps.exif_transpose(image))
        except UserError:
            raise
        except UnidentifiedImageError as error:
            raise UserError("is no image: Pillow cannot identify its format") from error
        # Pillow's parsers raise almost anything on broken bytes (OSError, SyntaxError, KeyError,
        # struct.error, …), and all of it means the same here.
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else "no message"
            raise UserError(f"cannot be decoded ({type(error).__name__}: {said})") from error
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    square = rgb.resize(
        (resolution, resolution),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,
    )
    return np.asarray(square).transpose(2, 0, 1)


@contextlib.contextmanager
def bombs_refused() -> Iterator[None]:
    """Inside, Pillow raises for a picture over its limit of 89 megapixels, before it decodes it."""
    with warnings.catch_warnings():
        # Other remarks are on metadata and do not concern the pixels.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it as 8 or 16 bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey from {grey.min()} to {grey.max()}; save it as 8 or 16 bit")
        # convert("RGB") would clip everything above 255 to white.
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
