"""The embedded art set: abstract paintings drawn by this file, deterministic by index, any size.

Every painting has two labels: its school (field ``style``) decides the composition, its palette
(field ``genre``) the colours. Geometry lives in unit coordinates and is filled on a grid twice as
fine as the picture, so one index at two sizes is one painting.
"""

import difflib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inl_core.run.errors import UserError

# What the art set is drawn with: seeded chance, boxes of colour, and a canvas with soft brushes.
#
# Shapes are signed distances in unit coordinates, negative inside, and are laid on as coverage.
# Pixel fields use only + - * / sqrt, floor, min and max, which IEEE arithmetic rounds alike on
# every processor, and chance is PCG64's plain uniform stream: the same picture everywhere.

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


MAX_SIZE = 16384
"""Longest side, in pixels, that `paint` accepts."""

_SUPERSAMPLE = 2
_BAND_SAMPLES = 1 << 17  # big pictures are drawn in bands of about this many, to stay in cache

_PALETTES: dict[str, Palette] = {
    "dawn": Palette(
        "fbeedb", "4a1526", "c81d3a", ("d7263d", "f46036", "f9a03f", "f7c6b4", "8f2d56")
    ),
    "ocean": Palette(
        "e6f2f5", "0b2545", "ff6f59", ("13709e", "0a9396", "63c7d6", "1f4e9c", "a9dcea")
    ),
    "forest": Palette(
        "f0eed5", "1d3320", "b5522b", ("2f6b3a", "7ba23f", "b9c65a", "c99a2e", "4f7f5d")
    ),
    "nocturne": Palette(
        "221a45", "f3e3b3", "f2b632", ("6a3fb5", "b25fd1", "e3b23c", "3d4ec7", "d1498b")
    ),
}


def _neoplasticism(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Mondrian: a canvas cut by thick upright lines, some of the cells filled."""
    half = dice.between(0.016, 0.026)
    far = 0.2  # cells at the border reach past it, so that no line frames the picture
    done = [(0.0, 0.0, 1.0, 1.0)]
    for cut in range(dice.whole(5, 7)):
        done.sort(key=lambda r: (r[2] - r[0]) * (r[3] - r[1]))
        left, top, right, bottom = done.pop()
        at = dice.between(0.3, 0.7)
        across = right - left > bottom - top if cut else dice.chance(0.5)
        if across:
            middle = left + at * (right - left)
            done += [(left, top, middle, bottom), (middle, top, right, bottom)]
        else:
            middle = top + at * (bottom - top)
            done += [(left, top, right, middle), (left, middle, right, bottom)]
    canvas.flood(colours.ink())
    paper, paints = colours.paper(), colours.paints(4)
    filled = dict(zip(dice.order(len(done)), paints[: dice.whole(3, 4)], strict=False))
    for i, (left, top, right, bottom) in enumerate(done):
        cover = canvas.box(
            left + half if left > 0 else -far,
            top + half if top > 0 else -far,
            right - half if right < 1 else 1 + far,
            bottom - half if bottom < 1 else 1 + far,
        )
        canvas.fill(cover, filled.get(i, paper))


def _suprematism(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Malevich: planes and bars afloat on a pale ground, all leaning along one diagonal."""
    canvas.flood(colours.paper())
    paints = [*colours.paints(5), colours.ink(), colours.ink()]
    lean = dice.between(0.4, 0.95) * (1 if dice.chance(0.5) else -1)
    u, v = canvas.turned(0.5, 0.5, lean)

    def plane(cu: float, cv: float, length: float, width: float, colour: Colour) -> None:
        reach = np.maximum(
            np.abs(u - np.float32(cu)) - np.float32(length / 2),
            np.abs(v - np.float32(cv)) - np.float32(width / 2),
        )
        canvas.fill(canvas.ramp(reach), colour)

    big = dice.between(0.28, 0.4)
    cu, cv = dice.between(-0.16, 0.16), dice.between(-0.2, 0.0)
    plane(cu, cv, big * dice.between(1.0, 1.5), big, paints[dice.whole(0, 1) * 5])
    below = cv + big / 2
    for i in range(dice.whole(2, 4)):
        width = dice.between(0.05, 0.095)
        below += dice.between(0.05, 0.08) + width
        plane(dice.between(-0.2, 0.2), below, dice.between(0.25, 0.6), width, paints[1 + i])
    for _ in range(dice.whole(1, 2)):  # bars that cross the others
        cu = dice.between(0.2, 0.42) * (1 if dice.chance(0.5) else -1)
        cross = paints[dice.whole(3, 6)]
        plane(cu, dice.between(-0.15, 0.15), 0.06, dice.between(0.3, 0.55), cross)
    if dice.chance(0.6):
        cx, cy = dice.between(0.15, 0.85), dice.between(0.1, 0.25)
        disc = canvas.radius(cx, cy) - np.float32(dice.between(0.07, 0.11))
        canvas.fill(canvas.ramp(disc), colours.accent())


def _color_field(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Rothko: two or three glowing, soft-edged rectangles stacked on a stained ground."""
    ground, *paints = colours.paints(4)
    canvas.flood(ground * np.float32(dice.between(0.55, 0.8)))
    side, soft = dice.between(0.07, 0.13), dice.between(0.05, 0.1)
    bands = dice.whole(2, 3)
    shares = [dice.between(0.6, 1.6) for _ in range(bands)]
    top, gap = dice.between(0.06, 0.1), dice.between(0.03, 0.06)
    room = 1.0 - 2 * top - gap * (bands - 1)
    for share, paint in zip(shares, paints, strict=False):
        bottom = top + room * share / sum(shares)
        glow = 1.0 + dice.between(-0.25, 0.25) * (canvas.y - np.float32((top + bottom) / 2))
        planar = paint[:, None, None] * glow
        canvas.fill(canvas.box(side, top, 1 - side, bottom, soft) * np.float32(0.95), planar)
        top = bottom + gap


def _action_painting(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Pollock: long looping throws of paint over each other from edge to edge, and splashes."""
    canvas.flood(colours.paper())
    paints = [colours.ink(), *colours.paints(3)]
    turn = dice.between(0.0, math.pi)
    throws = dice.whole(9, 12)
    for i in range(throws):
        angle = turn + math.pi * (i * 0.382 + dice.between(-0.1, 0.1))
        cx, cy = dice.between(0.15, 0.85), dice.between(0.15, 0.85)
        u, v = canvas.turned(cx, cy, angle)
        # v = u (p + q u + r u^2): a cubic that swings to both sides of its own axis.
        p, q, r = dice.between(-0.6, 0.6), dice.between(-2.4, 2.4), dice.between(-5.0, 5.0)
        slope = np.float32(p) + u * (np.float32(2 * q) + u * np.float32(3 * r))
        away = v - u * (np.float32(p) + u * (np.float32(q) + u * np.float32(r)))
        away = np.abs(away) / np.sqrt(1.0 + slope * slope)
        half = np.float32(dice.between(0.012, 0.029)) * (1.0 + np.float32(0.9) * u)
        canvas.fill(canvas.ramp(away - half), paints[i % 4 if i < throws - 2 else 0])
    for i in range(dice.whole(5, 9)):
        splash = canvas.radius(dice.between(0.0, 1.0), dice.between(0.0, 1.0))
        canvas.fill(canvas.ramp(splash - np.float32(dice.between(0.015, 0.04))), paints[i % 4])


def _op_art(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Riley: two tones in waves of stripes that crowd together and open again."""
    upright = dice.chance(0.5)
    along, across = (canvas.y, canvas.x) if upright else (canvas.x, canvas.y)
    swing, beats = dice.between(0.05, 0.11), dice.between(0.8, 1.6)
    start = dice.between(0.0, 2 * math.pi)
    wave = np.sin(along.astype(np.float64) * (2 * math.pi * beats) + start) * swing
    count, crowd = dice.between(4.0, 5.5), dice.between(-0.25, 0.25)
    t = across + wave.astype(np.float32)
    phase = np.float32(count) * t * (1.0 + np.float32(crowd) * (t - 1.0)) + np.float32(
        dice.between(0.0, 1.0)
    )
    saw = np.abs(phase - np.floor(phase) - np.float32(0.5)) - np.float32(0.25)
    canvas.flood(colours.paper())
    canvas.fill(canvas.ramp(saw * np.float32(1.0 / count)), colours.ink())


def _orphism(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Delaunay: a great disc of rings, cut in four, every quarter in its own colour."""
    canvas.flood(colours.paper())
    cx, cy = dice.between(0.38, 0.62), dice.between(0.38, 0.62)
    u, v = canvas.turned(cx, cy, dice.between(0.0, math.pi / 2))
    radius = canvas.radius(cx, cy)
    first, second = canvas.ramp(u), canvas.ramp(v)
    quarters = [first * second, first - first * second]
    quarters += [second - quarters[0], 1.0 - first - second + quarters[0]]

    def cut(paints: Sequence[Colour]) -> Field:
        pieces = [q * c[:, None, None] for q, c in zip(quarters, paints, strict=True)]
        return (pieces[0] + pieces[1]) + (pieces[2] + pieces[3])

    stain = np.full_like(u, dice.between(0.1, 0.4))
    canvas.fill(stain, cut(colours.paints(4)))
    rings = dice.whole(4, 5)
    reach, hole = dice.between(0.4, 0.5), dice.between(0.07, 0.11)
    for ring in range(rings):
        outer = reach - (reach - hole) * ring / (rings - 1)
        paints = [*colours.paints(4 - ring % 2), colours.ink()][:4]
        canvas.fill(canvas.ramp(radius - np.float32(outer)), cut(paints))


def _hard_edge(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Noland: nested chevrons, flat and sharp, across the whole canvas."""
    canvas.flood(colours.paper())
    side = dice.whole(0, 3)
    u, v = canvas.turned(0.5, 0.5, side * math.pi / 2)
    steep = dice.between(0.8, 1.4)
    fold = np.abs(u - np.float32(dice.between(-0.12, 0.12)))
    s = (v + fold * np.float32(steep)) * np.float32(1.0 / math.sqrt(1.0 + steep * steep))
    bands = dice.whole(4, 5)
    at = dice.between(-0.1, 0.0)
    for paint in [colours.ink(), *colours.paints(bands - 1)]:
        width = dice.between(0.075, 0.115)
        middle = np.float32(at + width / 2)
        canvas.fill(canvas.ramp(np.abs(s - middle) - np.float32(width / 2)), paint)
        at += width
        if dice.chance(0.25):
            at += dice.between(0.03, 0.05)


def _pointillism(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Seurat's dots without his figures: a lattice of them, shading from a glow outwards."""
    canvas.flood(colours.paper())
    across = dice.between(6.0, 7.5)
    shift_x, shift_y = dice.between(0.0, 1.0), dice.between(0.0, 1.0)
    fy = canvas.y * np.float32(across) + np.float32(shift_y)
    row = np.floor(fy).astype(np.intp)
    indent = (row % 2).astype(np.float32) * np.float32(0.5)
    fx = canvas.x * np.float32(across) + np.float32(shift_x) + indent
    column = np.floor(fx).astype(np.intp)
    n = int(across) + 3
    loose = dice.table(2, n, n).astype(np.float32) * np.float32(0.1) - np.float32(0.05)
    dx = fx - column.astype(np.float32) - np.float32(0.5) - loose[0][row, column]
    dy = fy - row.astype(np.float32) - np.float32(0.5) - loose[1][row, column]
    size = dice.between(0.36, 0.43)
    glow_x, glow_y = dice.between(0.2, 0.8) * across, dice.between(0.2, 0.8) * across
    grid = np.arange(n, dtype=np.float32)
    gx, gy = grid[None, :] - np.float32(glow_x), grid[:, None] - np.float32(glow_y)
    # Dots are never mixed: chance picks the nearer of two paints more often, and the eye blends.
    t = np.sqrt(gx * gx + gy * gy) * np.float32(3.2 / across) + dice.table(n, n) * 0.9
    ladder = np.stack([colours.accent(), *colours.paints(2), colours.ink()])
    shade = dice.table(n, n, 1).astype(np.float32) * np.float32(0.24) + np.float32(0.88)
    tints = ladder[np.minimum(np.floor(t), 3).astype(np.intp)] * shade
    cover = canvas.ramp((np.sqrt(dx * dx + dy * dy) - np.float32(size)) * np.float32(1 / across))
    canvas.fill(cover, np.moveaxis(tints[row, column], -1, 0))


def _zen_ink(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """The ensō: one brushed circle, open where the brush lifts, and a seal."""
    canvas.flood(colours.paper())
    cx, cy = dice.between(0.44, 0.56), dice.between(0.44, 0.56)
    size = dice.between(0.27, 0.34)
    u, v = canvas.turned(cx, cy, dice.between(0.0, 2 * math.pi))
    radius = np.sqrt(u * u + v * v)
    facing = u / np.maximum(radius, np.float32(1e-6))
    beside = v / np.maximum(radius, np.float32(1e-6))
    # Ink left on the brush: none in a gap opposite the landing, and it runs out on one side.
    left = facing + np.float32(dice.between(0.82, 0.94))
    hand = np.float32(dice.between(0.15, 0.35) * (1 if dice.chance(0.5) else -1))
    weight = np.clip(left * np.float32(2.2), -0.2, 0.8) + hand * beside * np.minimum(left, 1.0)
    away = radius - np.float32(size) - np.float32(dice.between(-0.05, 0.05)) * beside
    half = np.float32(dice.between(0.045, 0.07)) * weight
    bristle = away * np.float32(dice.between(70.0, 90.0))
    dry = np.abs(bristle - np.floor(bristle) - np.float32(0.5)) * 2.0
    wet = np.clip(weight * 3.0 - dry * 0.9, 0.0, 1.0)
    canvas.fill(canvas.ramp(np.abs(away) - half) * wet, colours.ink())
    edge = dice.between(0.05, 0.07)
    x, y = (0.86 if dice.chance(0.5) else 0.14), dice.between(0.82, 0.88)
    canvas.fill(canvas.box(x - edge, y - edge, x + edge, y + edge), colours.accent())


_PAINTERS: dict[str, Callable[[Canvas, Dice, Colours], None]] = {
    "Action_Painting": _action_painting,
    "Color_Field_Painting": _color_field,
    "Hard_Edge_Painting": _hard_edge,
    "Neoplasticism": _neoplasticism,
    "Op_Art": _op_art,
    "Orphism": _orphism,
    "Pointillism": _pointillism,
    "Suprematism": _suprematism,
    "Zen_Ink": _zen_ink,
}

SCHOOLS: tuple[str, ...] = tuple(_PAINTERS)
"""Names of the schools; a name's position is its id in the field ``style``."""

PALETTES: tuple[str, ...] = tuple(_PALETTES)
"""Names of the palettes; a name's position is its id in the field ``genre``."""

LABEL_NAMES: dict[str, tuple[str, ...]] = {"style": SCHOOLS, "genre": PALETTES}
"""Label fields of the art set and their vocabularies."""


def _checked_index(index: int) -> int:
    try:
        number = operator.index(index)
    except TypeError:
        raise UserError(f"index is {index!r}; expected an integer of 0 or more") from None
    if number < 0:
        raise UserError(f"index is {number}; expected an integer of 0 or more")
    return number


def _label_id(field: str, value: str | int, names: Sequence[str]) -> int:
    if isinstance(value, str):
        if value in names:
            return names.index(value)
        near = difflib.get_close_matches(value, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}"
        raise UserError(f"the art set has no {field} {value!r}; {hint}")
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < len(names):
        raise UserError(
            f"{field} is {value!r}; expected a name or an id from 0 to {len(names) - 1} "
            f"({', '.join(names)})"
        )
    return number


def _width_height(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = size if isinstance(size, tuple) else (size, size)
    try:
        sides = tuple(operator.index(side) for side in pair)
    except TypeError:
        sides = ()
    if len(sides) != 2 or not all(1 <= side <= MAX_SIZE for side in sides):
        raise UserError(
            f"size is {size!r}; expected a whole number of pixels from 1 to {MAX_SIZE}, "
            "or a pair (width, height) of them"
        )
    return sides[0], sides[1]


def labels_of(index: int) -> dict[str, int]:
    """Labels of the painting with this index, as ids into `LABEL_NAMES`.

    With S schools and P palettes and k = index mod (S * P), the school is k mod S and the palette
    (k // S + k mod S) mod P: a permutation of all pairs. So every S consecutive indices from a
    multiple of S hold each school once, and every S * P consecutive ones each pair once.

    Args:
        index: number of the painting, 0 or more.

    Returns:
        ``{"style": school id, "genre": palette id}``.

    Raises:
        UserError: if the index is not an integer of 0 or more.
    """
    k = _checked_index(index) % (len(SCHOOLS) * len(PALETTES))
    school = k % len(SCHOOLS)
    return {"style": school, "genre": (k // len(SCHOOLS) + school) % len(PALETTES)}


def paint(
    index: int,
    size: int | tuple[int, int] = 64,
    *,
    style: str | int | None = None,
    genre: str | int | None = None,
) -> Image.Image:
    """Draw one painting of the art set.

    The composition depends on the index and the school only: the same index and school in another
    palette is the same drawing in other colours.

    Args:
        index: number of the painting, 0 or more.
        size: side of a square picture in pixels, or (width, height). The longer side spans the
            painting; along the shorter one its centre is shown.
        style: school, by name or id; None takes that of `labels_of`.
        genre: palette, by name or id; None takes that of `labels_of`.

    Returns:
        An RGB image of width x height pixels, the same bytes for the same arguments.

    Raises:
        UserError: if the index is negative or no integer, a side is not within 1 to `MAX_SIZE`,
            or the school or palette is unknown.
    """
    number = _checked_index(index)
    labels = labels_of(number)
    school = labels["style"] if style is None else _label_id("style", style, SCHOOLS)
    palette = labels["genre"] if genre is None else _label_id("genre", genre, PALETTES)
    width, height = _width_height(size)
    longest = max(width, height)

    def ticks(count: int) -> Field:
        place = (np.arange(count * _SUPERSAMPLE) + 0.5) / (longest * _SUPERSAMPLE)
        return (place + (longest - count) / (2 * longest)).astype(np.float32)

    x, y = ticks(width)[None, :], ticks(height)[:, None]
    rows = _SUPERSAMPLE * max(1, _BAND_SAMPLES // (x.size * _SUPERSAMPLE))
    picture = np.empty((height, width, 3), np.uint8)
    for top in range(0, y.size, rows):
        canvas = Canvas(x, y[top : top + rows], 1.0 / (longest * _SUPERSAMPLE))
        dice = Dice(1, school, 0, number)
        colours = Colours(_PALETTES[PALETTES[palette]], Dice(2, school, palette, number))
        _PAINTERS[SCHOOLS[school]](canvas, dice, colours)
        # A lamp somewhere before the picture: light falls off slowly to one side.
        lit = 1.0 + np.float32(dice.between(-0.1, 0.1)) * (canvas.x - np.float32(0.5))
        lit = lit + np.float32(dice.between(-0.1, 0.1)) * (canvas.y - np.float32(0.5))
        fine = np.clip(canvas.rgb * lit, 0.0, 1.0)
        mean = (fine[:, ::2, ::2] + fine[:, 1::2, ::2]) + (fine[:, ::2, 1::2] + fine[:, 1::2, 1::2])
        levels = np.floor(mean * np.float32(255 / 4) + np.float32(0.5)).astype(np.uint8)
        start = top // _SUPERSAMPLE
        picture[start : start + levels.shape[1]] = np.moveaxis(levels, 0, -1)
    return Image.fromarray(picture)
