"""What the art set is drawn with: seeded chance, boxes of colour, and a canvas with soft brushes.

Shapes are signed distances in unit coordinates, negative inside, and are laid on as coverage. Pixel
fields use only + - * / sqrt, floor, min and max, which IEEE arithmetic rounds alike on every
processor, and chance is PCG64's plain uniform stream: the same picture everywhere.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating]
"""Float32 values over the supersampled grid, shape (rows, columns) or one that broadcasts to it.

Named `floating` because NumPy's stubs lose the width where a float32 number meets an array.
"""
Colour = NDArray[np.floating]
"""Float32 sRGB in [0, 1], shape (3,)."""

_SEED = 20151205  # part of every seed: changing it makes another art set


@dataclass(frozen=True)
class Palette:
    """Colours as hex strings: the bare canvas, the line on it, a seal, and five paints."""

    paper: str
    ink: str
    accent: str
    paints: tuple[str, str, str, str, str]


def _rgb(code: str) -> Colour:
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / np.float32(255)


class Dice:
    """Uniform numbers from PCG64 in the order asked; `Generator.random` is all that is used.

    Args:
        *key: integers of 0 or more that name the stream. Give every stream the same number of
            them: `SeedSequence` pads with zeros, so (1, 2) and (1, 2, 0) are one stream.
    """

    def __init__(self, *key: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_SEED, *key])))

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * float(self._rng.random())

    def whole(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._rng.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return float(self._rng.random()) < probability

    def table(self, *shape: int) -> NDArray[np.float64]:
        """Numbers in [0, 1), of this shape."""
        return self._rng.random(shape)

    def order(self, n: int) -> list[int]:
        """The numbers 0 to n - 1, shuffled."""
        return [int(i) for i in np.argsort(self._rng.random(n), kind="stable")]


class Colours:
    """One painter's box: the palette with every colour a little different each time it is used."""

    def __init__(self, palette: Palette, dice: Dice) -> None:
        self._palette = palette
        self._dice = dice

    def _mixed(self, code: str, spread: float) -> Colour:
        wobble = [self._dice.between(-spread, spread) for _ in range(3)]
        light = self._dice.between(-spread, spread)
        shift = np.array([light + 0.5 * w for w in wobble], np.float32)
        return np.clip(_rgb(code) + shift, 0.0, 1.0)

    def paper(self) -> Colour:
        """The bare canvas: light, but dark in a night palette."""
        return self._mixed(self._palette.paper, 0.025)

    def ink(self) -> Colour:
        """What stands out most from the paper."""
        return self._mixed(self._palette.ink, 0.03)

    def accent(self) -> Colour:
        """The one foreign colour of the palette."""
        return self._mixed(self._palette.accent, 0.05)

    def paints(self, n: int) -> list[Colour]:
        """So many paints in chance order; the first five differ, then the order repeats."""
        codes = self._palette.paints
        order = self._dice.order(len(codes))
        return [self._mixed(codes[order[i % len(codes)]], 0.06) for i in range(n)]


class Canvas:
    """Planar RGB (3, rows, columns) over part of the unit square, and the brushes that fill it.

    ``x`` is (1, columns) and grows rightwards, ``y`` is (rows, 1) and grows downwards; ``step`` is
    the width of one sample.
    """

    def __init__(self, x: Field, y: Field, step: float) -> None:
        self.x, self.y, self.step = x, y, step
        self.rgb = np.zeros((3, y.shape[0], x.shape[1]), np.float32)

    def ramp(self, distance: Field, soft: float = 0.0) -> Field:
        """Coverage of a shape, 1 inside and 0 outside, from its signed distance.

        The edge is one sample wide, or ``soft`` wide and smooth when that is more.
        """
        if soft <= self.step:
            return np.clip(0.5 - distance * np.float32(1.0 / self.step), 0.0, 1.0)
        t = np.clip(0.5 - distance * np.float32(1.0 / soft), 0.0, 1.0)
        return t * t * (3.0 - 2.0 * t)

    def turned(self, cx: float, cy: float, angle: float) -> tuple[Field, Field]:
        """Coordinates along and across a line through (cx, cy) at ``angle`` radians."""
        c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        dx, dy = self.x - np.float32(cx), self.y - np.float32(cy)
        return dx * c + dy * s, dy * c - dx * s

    def radius(self, cx: float, cy: float) -> Field:
        """Distance from the point (cx, cy)."""
        dx, dy = self.x - np.float32(cx), self.y - np.float32(cy)
        return np.sqrt(dx * dx + dy * dy)

    def flood(self, colour: Colour) -> None:
        """Cover everything with one colour."""
        self.rgb[:] = colour[:, None, None]

    def fill(self, cover: Field, colour: Colour | Field) -> None:
        """Lay ``colour``, (3,) or planar, over the picture where ``cover`` (in [0, 1]) says."""
        paint = colour[:, None, None] if colour.ndim == 1 else colour
        self.rgb += cover * (paint - self.rgb)

    def box(self, left: float, top: float, right: float, bottom: float, soft: float = 0.0) -> Field:
        """Coverage of an upright rectangle."""
        wide = np.abs(self.x - np.float32((left + right) / 2)) - np.float32((right - left) / 2)
        high = np.abs(self.y - np.float32((top + bottom) / 2)) - np.float32((bottom - top) / 2)
        return self.ramp(wide, soft) * self.ramp(high, soft)
