"""Grids of pictures with captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inl_core.run.files import atomic_file


def save_grid(
    images: np.ndarray, columns: int, captions: Sequence[str], path: Path, scale: int | None = None
) -> None:
    """Write a PNG grid with one caption at the left of each row.

    Args:
        images: uint8 (N, Y, X, 3), row by row.
        columns: Pictures in a row.
        captions: One for each row; empty strings leave no margin.
        path: Where to write; written aside and renamed.
        scale: Integer enlargement (nearest pixel); None enlarges small pictures to about 96 pixels.
    """
    save_image(draw_grid(images, columns, captions, scale=scale), path)


def draw_grid(
    images: np.ndarray,
    columns: int,
    captions: Sequence[str] = (),
    below: Sequence[str] = (),
    scale: int | None = None,
) -> Image.Image:
    """A grid of pictures, with captions at the left of rows, below pictures, or both.

    Args:
        images: uint8 (N, Y, X, 3), row by row.
        columns: Pictures in a row.
        captions: One for each row; empty strings leave no margin.
        below: One for each picture.
        scale: Integer enlargement (nearest pixel); None enlarges small pictures to about 96 pixels.
    """
    count, height, width, _ = images.shape
    scale = scale or max(1, round(96 / height))
    rows, gap, line = -(-count // columns), 4, 18 if below else 0
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=11)
    margin = max((int(font.getlength(c)) + 16 for c in captions if c), default=0)
    cell_h, cell_w = height * scale + gap + line, width * scale + gap
    sheet = Image.new("RGB", (margin + columns * cell_w + gap, rows * cell_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        picture = Image.fromarray(image).resize((width * scale, height * scale), Image.NEAREST)
        left, top = margin + gap + column * cell_w, gap + row * cell_h
        sheet.paste(picture, (left, top))
        if below:
            text = _shortened(below[i], width * scale, small)
            place = (left + width * scale // 2, top + height * scale + line // 2)
            draw.text(place, text, fill="black", font=small, anchor="mm")
    for row, caption in enumerate(captions[:rows]):
        y = gap + row * cell_h + height * scale // 2
        draw.text((8, y), caption, fill="black", font=font, anchor="lm")
    return sheet


def _shortened(text: str, width: int, font: Any) -> str:
    """A text that fits into so many pixels, cut with an ellipsis if need be."""
    whole = text
    while text and font.getlength(text if text == whole else f"{text}…") > width:
        text = text[:-1]
    return text if text == whole else f"{text}…"


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG; no half-written file ever has the final name."""
    with atomic_file(path) as aside:
        image.save(aside, format="PNG")
