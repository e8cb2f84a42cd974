"""Grids of pictures with captions, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from inl_core.run.files import atomic_file

_GAP = 4  # pixels around each picture
_WHITE = 255.0


def save_grid(
    images: np.ndarray, columns: int, captions: Sequence[str], path: Path, scale: int | None = None
) -> None:
    """Write the grid that `draw_grid` draws as a PNG, atomically."""
    save_image(draw_grid(images, columns, captions, scale=scale), path)


def draw_grid(
    images: np.ndarray,
    columns: int,
    captions: Sequence[str] = (),
    below: Sequence[str] = (),
    scale: int | None = None,
) -> Image.Image:
    """Arrange pictures in a grid, with captions left of the rows, below the pictures, or both.

    Args:
        images: uint8 (N, Y, X, 3), row by row.
        columns: Pictures per row.
        captions: One per row; empty strings leave no margin.
        below: One per picture.
        scale: Integer enlargement (nearest pixel); None enlarges small pictures to about 96 pixels.
    """
    count, height, width, _ = images.shape
    scale = scale or max(1, round(96 / height))
    height, width, line = height * scale, width * scale, 18 if below else 0
    rows = -(-count // columns)
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=11)
    margin = max((int(font.getlength(caption)) + 16 for caption in captions if caption), default=0)

    tiles = torch.from_numpy(images).permute(0, 3, 1, 2)
    tiles = F.resize(tiles, [height, width], InterpolationMode.NEAREST)
    # Gap and line are padded here: make_grid would leave the gap out around a single picture.
    tiles = F.pad(tiles, [_GAP, _GAP, 0, line], fill=_WHITE)
    grid = make_grid(tiles, columns, padding=0, pad_value=_WHITE)
    missing = (columns - min(columns, count)) * (width + _GAP)  # of a first row that is not full
    sheet = F.to_pil_image(F.pad(grid, [margin, 0, missing + _GAP, _GAP], fill=_WHITE))

    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(below[:count]):
        row, column = divmod(i, columns)
        x = margin + _GAP + column * (width + _GAP) + width // 2
        y = _GAP + row * (height + _GAP + line) + height + line // 2
        draw.text((x, y), _shortened(text, width, small), fill="black", font=small, anchor="mm")
    for row, caption in enumerate(captions[:rows]):
        y = _GAP + row * (height + _GAP + line) + height // 2
        draw.text((8, y), caption, fill="black", font=font, anchor="lm")
    return sheet


def _shortened(text: str, width: int, font: Any) -> str:
    """Cut a text to a width in pixels, ending it with an ellipsis if anything was cut."""
    short = text
    while short and font.getlength(short if short == text else f"{short}…") > width:
        short = short[:-1]
    return short if short == text else f"{short}…"


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically: no partly written file ever has the final name."""
    with atomic_file(path) as scratch:
        image.save(scratch, format="PNG")
