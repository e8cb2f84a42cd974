"""The embedded art set: abstract paintings drawn by code, at any size, one per index.

Every painting has two labels: its school (field `style`) determines the composition, its palette
(field `genre`) the colours. Shapes are signed distances in unit coordinates, negative inside, and
are drawn as coverage on a grid twice as fine as the picture, so one index at two sizes is the same
painting. Pixels use only + - * / sqrt, floor, min and max, which IEEE arithmetic rounds alike on
every processor, and random numbers are PCG64's uniform stream: the same bytes on every machine.

The source text of this file is part of a cache key: any edit draws the set once more.
"""

import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
from numpy import float32
from numpy.typing import NDArray
from PIL import Image

from complexity_dit.labels import resolve_label
from inl_core.run.errors import UserError

Field = NDArray[np.floating]
"""Float32 values over the supersampled grid, of shape (rows, columns) or one that broadcasts to it.

`floating`, as NumPy's stubs lose the width where a float32 number meets an array.
"""
Colour = NDArray[np.floating]
"""Float32 sRGB in [0, 1], shape (3,)."""

_SEED = 20151205  # part of every seed: changing it makes another art set


class Dice:
    """Random numbers from PCG64; `Generator.random` is the only method of NumPy that is used.

    Args:
        *key: Non-negative integers that name the stream, equally many for every stream:
            `SeedSequence` pads with zeros, so (1, 2) and (1, 2, 0) are the same stream.
    """

    def __init__(self, *key: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_SEED, *key])))

    def uniform(self, low: float, high: float) -> float:
        """Draw a number in [low, high)."""
        return low + (high - low) * float(self._rng.random())

    def integer(self, low: int, high: int) -> int:
        """Draw an integer from low to high, both included."""
        return low + int(self._rng.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return float(self._rng.random()) < probability

    def array(self, *shape: int) -> NDArray[np.float64]:
        """Draw an array of numbers in [0, 1)."""
        return self._rng.random(shape)

    def permutation(self, n: int) -> list[int]:
        """Draw a permutation of 0 to n - 1."""
        return [int(i) for i in np.argsort(self._rng.random(n), kind="stable")]


class Colours:
    """A palette whose colours vary a little each time they are used."""

    def __init__(self, palette: str, dice: Dice) -> None:
        self._paper, self._ink, self._accent, *self._paints = palette.split()
        self._dice = dice

    def _mixed(self, code: str, spread: float) -> Colour:
        wobble = [self._dice.uniform(-spread, spread) for _ in range(3)]
        light = self._dice.uniform(-spread, spread)
        shift = np.array([light + 0.5 * w for w in wobble], float32)
        rgb = np.frombuffer(bytes.fromhex(code), np.uint8).astype(float32) / float32(255)
        return np.clip(rgb + shift, 0.0, 1.0)

    def paper(self) -> Colour:
        """Mix the colour of the canvas: light, but dark in a night palette."""
        return self._mixed(self._paper, 0.025)

    def ink(self) -> Colour:
        """Mix the colour that contrasts most with the paper."""
        return self._mixed(self._ink, 0.03)

    def accent(self) -> Colour:
        """Mix the one colour outside the palette's range."""
        return self._mixed(self._accent, 0.05)

    def paints(self, n: int) -> list[Colour]:
        """Mix n paints in random order; the first five differ, then the order repeats."""
        order = self._dice.permutation(len(self._paints))
        return [self._mixed(self._paints[order[i % len(order)]], 0.06) for i in range(n)]


class Canvas:
    """Planar RGB (3, rows, columns) over part of the unit square, with functions that fill it.

    `x` is (1, columns) and grows rightwards, `y` is (rows, 1) and grows downwards; `step` is the
    width of one sample.
    """

    def __init__(self, x: Field, y: Field, step: float) -> None:
        self.x, self.y, self.step = x, y, step
        self.rgb = np.zeros((3, y.shape[0], x.shape[1]), float32)

    def ramp(self, distance: Field, soft: float = 0.0) -> Field:
        """Return the coverage of a shape, 1 inside and 0 outside, from its signed distance.

        The edge is one sample wide, or `soft` wide and smooth when that is more.
        """
        if soft <= self.step:
            return np.clip(0.5 - distance * float32(1.0 / self.step), 0.0, 1.0)
        t = np.clip(0.5 - distance * float32(1.0 / soft), 0.0, 1.0)
        return t * t * (3.0 - 2.0 * t)

    def turned(self, cx: float, cy: float, angle: float) -> tuple[Field, Field]:
        """Return coordinates along and across a line through (cx, cy) at `angle` radians."""
        c, s = float32(math.cos(angle)), float32(math.sin(angle))
        dx, dy = self.x - float32(cx), self.y - float32(cy)
        return dx * c + dy * s, dy * c - dx * s

    def radius(self, cx: float, cy: float) -> Field:
        """Return the distance from the point (cx, cy)."""
        dx, dy = self.x - float32(cx), self.y - float32(cy)
        return np.sqrt(dx * dx + dy * dy)

    def flood(self, colour: Colour) -> None:
        """Fill the canvas with one colour."""
        self.rgb[:] = colour[:, None, None]

    def fill(self, cover: Field, colour: Colour | Field) -> None:
        """Blend `colour`, (3,) or planar, over the picture by `cover` in [0, 1]."""
        paint = colour[:, None, None] if colour.ndim == 1 else colour
        self.rgb += cover * (paint - self.rgb)

    def box(self, left: float, top: float, right: float, bottom: float, soft: float = 0.0) -> Field:
        """Return the coverage of an upright rectangle."""
        wide = np.abs(self.x - float32((left + right) / 2)) - float32((right - left) / 2)
        high = np.abs(self.y - float32((top + bottom) / 2)) - float32((bottom - top) / 2)
        return self.ramp(wide, soft) * self.ramp(high, soft)


MAX_SIZE = 16384
"""Longest side, in pixels, that `paint` accepts."""

_SUPERSAMPLE = 2
_BAND_SAMPLES = 1 << 17  # large pictures are drawn in bands of about this size, to stay in cache

# Canvas, lines, accent, and five paints, as hex.
_PALETTES = {
    "dawn":     "fbeedb  4a1526  c81d3a  d7263d f46036 f9a03f f7c6b4 8f2d56",
    "ocean":    "e6f2f5  0b2545  ff6f59  13709e 0a9396 63c7d6 1f4e9c a9dcea",
    "forest":   "f0eed5  1d3320  b5522b  2f6b3a 7ba23f b9c65a c99a2e 4f7f5d",
    "nocturne": "221a45  f3e3b3  f2b632  6a3fb5 b25fd1 e3b23c 3d4ec7 d1498b",
}  # fmt: skip


def _neoplasticism(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Mondrian: a canvas divided by thick straight lines, some of the cells filled."""
    half = dice.uniform(0.016, 0.026)
    far = 0.2  # cells at the border extend beyond it, so that no line frames the picture
    done = [(0.0, 0.0, 1.0, 1.0)]
    for cut in range(dice.integer(5, 7)):
        done.sort(key=lambda r: (r[2] - r[0]) * (r[3] - r[1]))
        left, top, right, bottom = done.pop()
        at = dice.uniform(0.3, 0.7)
        across = right - left > bottom - top if cut else dice.chance(0.5)
        if across:
            middle = left + at * (right - left)
            done += [(left, top, middle, bottom), (middle, top, right, bottom)]
        else:
            middle = top + at * (bottom - top)
            done += [(left, top, right, middle), (left, middle, right, bottom)]
    canvas.flood(colours.ink())
    paper, paints = colours.paper(), colours.paints(4)
    filled = dict(zip(dice.permutation(len(done)), paints[: dice.integer(3, 4)], strict=False))
    for i, (left, top, right, bottom) in enumerate(done):
        cover = canvas.box(
            left + half if left > 0 else -far,
            top + half if top > 0 else -far,
            right - half if right < 1 else 1 + far,
            bottom - half if bottom < 1 else 1 + far,
        )
        canvas.fill(cover, filled.get(i, paper))


def _suprematism(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Malevich: planes and bars on a pale ground, all along one diagonal."""
    canvas.flood(colours.paper())
    paints = [*colours.paints(5), colours.ink(), colours.ink()]
    lean = dice.uniform(0.4, 0.95) * (1 if dice.chance(0.5) else -1)
    u, v = canvas.turned(0.5, 0.5, lean)

    def plane(cu: float, cv: float, length: float, width: float, colour: Colour) -> None:
        reach = np.maximum(
            np.abs(u - float32(cu)) - float32(length / 2),
            np.abs(v - float32(cv)) - float32(width / 2),
        )
        canvas.fill(canvas.ramp(reach), colour)

    big = dice.uniform(0.28, 0.4)
    cu, cv = dice.uniform(-0.16, 0.16), dice.uniform(-0.2, 0.0)
    plane(cu, cv, big * dice.uniform(1.0, 1.5), big, paints[dice.integer(0, 1) * 5])
    below = cv + big / 2
    for i in range(dice.integer(2, 4)):
        width = dice.uniform(0.05, 0.095)
        below += dice.uniform(0.05, 0.08) + width
        plane(dice.uniform(-0.2, 0.2), below, dice.uniform(0.25, 0.6), width, paints[1 + i])
    for _ in range(dice.integer(1, 2)):  # bars that cross the others
        cu = dice.uniform(0.2, 0.42) * (1 if dice.chance(0.5) else -1)
        cross = paints[dice.integer(3, 6)]
        plane(cu, dice.uniform(-0.15, 0.15), 0.06, dice.uniform(0.3, 0.55), cross)
    if dice.chance(0.6):
        cx, cy = dice.uniform(0.15, 0.85), dice.uniform(0.1, 0.25)
        disc = canvas.radius(cx, cy) - float32(dice.uniform(0.07, 0.11))
        canvas.fill(canvas.ramp(disc), colours.accent())


def _color_field(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Rothko: two or three soft-edged rectangles stacked on a darker ground."""
    ground, *paints = colours.paints(4)
    canvas.flood(ground * float32(dice.uniform(0.55, 0.8)))
    side, soft = dice.uniform(0.07, 0.13), dice.uniform(0.05, 0.1)
    bands = dice.integer(2, 3)
    shares = [dice.uniform(0.6, 1.6) for _ in range(bands)]
    top, gap = dice.uniform(0.06, 0.1), dice.uniform(0.03, 0.06)
    room = 1.0 - 2 * top - gap * (bands - 1)
    for share, paint in zip(shares, paints, strict=False):
        bottom = top + room * share / sum(shares)
        glow = 1.0 + dice.uniform(-0.25, 0.25) * (canvas.y - float32((top + bottom) / 2))
        planar = paint[:, None, None] * glow
        canvas.fill(canvas.box(side, top, 1 - side, bottom, soft) * float32(0.95), planar)
        top = bottom + gap


def _action_painting(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Pollock: long curved lines of paint over each other from edge to edge, and splashes."""
    canvas.flood(colours.paper())
    paints = [colours.ink(), *colours.paints(3)]
    turn = dice.uniform(0.0, math.pi)
    throws = dice.integer(9, 12)
    for i in range(throws):
        angle = turn + math.pi * (i * 0.382 + dice.uniform(-0.1, 0.1))
        cx, cy = dice.uniform(0.15, 0.85), dice.uniform(0.15, 0.85)
        u, v = canvas.turned(cx, cy, angle)
        # v = u (p + q u + r u^2): a cubic that swings to both sides of its own axis.
        p, q, r = dice.uniform(-0.6, 0.6), dice.uniform(-2.4, 2.4), dice.uniform(-5.0, 5.0)
        slope = float32(p) + u * (float32(2 * q) + u * float32(3 * r))
        away = v - u * (float32(p) + u * (float32(q) + u * float32(r)))
        away = np.abs(away) / np.sqrt(1.0 + slope * slope)
        half = float32(dice.uniform(0.012, 0.029)) * (1.0 + float32(0.9) * u)
        canvas.fill(canvas.ramp(away - half), paints[i % 4 if i < throws - 2 else 0])
    for i in range(dice.integer(5, 9)):
        splash = canvas.radius(dice.uniform(0.0, 1.0), dice.uniform(0.0, 1.0))
        canvas.fill(canvas.ramp(splash - float32(dice.uniform(0.015, 0.04))), paints[i % 4])


def _op_art(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Riley: two tones in wavy stripes of varying width."""
    upright = dice.chance(0.5)
    along, across = (canvas.y, canvas.x) if upright else (canvas.x, canvas.y)
    swing, beats = dice.uniform(0.05, 0.11), dice.uniform(0.8, 1.6)
    start = dice.uniform(0.0, 2 * math.pi)
    wave = np.sin(along.astype(np.float64) * (2 * math.pi * beats) + start) * swing
    count, crowd = dice.uniform(4.0, 5.5), dice.uniform(-0.25, 0.25)
    t = across + wave.astype(float32)
    phase = float32(count) * t * (1.0 + float32(crowd) * (t - 1.0)) + float32(
        dice.uniform(0.0, 1.0)
    )
    saw = np.abs(phase - np.floor(phase) - float32(0.5)) - float32(0.25)
    canvas.flood(colours.paper())
    canvas.fill(canvas.ramp(saw * float32(1.0 / count)), colours.ink())


def _orphism(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Delaunay: a large disc of rings in four quarters, each in its own colours."""
    canvas.flood(colours.paper())
    cx, cy = dice.uniform(0.38, 0.62), dice.uniform(0.38, 0.62)
    u, v = canvas.turned(cx, cy, dice.uniform(0.0, math.pi / 2))
    radius = canvas.radius(cx, cy)
    first, second = canvas.ramp(u), canvas.ramp(v)
    quarters = [first * second, first - first * second]
    quarters += [second - quarters[0], 1.0 - first - second + quarters[0]]

    def cut(paints: Sequence[Colour]) -> Field:
        pieces = [q * c[:, None, None] for q, c in zip(quarters, paints, strict=True)]
        return (pieces[0] + pieces[1]) + (pieces[2] + pieces[3])

    stain = np.full_like(u, dice.uniform(0.1, 0.4))
    canvas.fill(stain, cut(colours.paints(4)))
    rings = dice.integer(4, 5)
    reach, hole = dice.uniform(0.4, 0.5), dice.uniform(0.07, 0.11)
    for ring in range(rings):
        outer = reach - (reach - hole) * ring / (rings - 1)
        paints = [*colours.paints(4 - ring % 2), colours.ink()][:4]
        canvas.fill(canvas.ramp(radius - float32(outer)), cut(paints))


def _hard_edge(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Noland: nested chevrons, flat and sharp, across the whole canvas."""
    canvas.flood(colours.paper())
    side = dice.integer(0, 3)
    u, v = canvas.turned(0.5, 0.5, side * math.pi / 2)
    steep = dice.uniform(0.8, 1.4)
    fold = np.abs(u - float32(dice.uniform(-0.12, 0.12)))
    s = (v + fold * float32(steep)) * float32(1.0 / math.sqrt(1.0 + steep * steep))
    bands = dice.integer(4, 5)
    at = dice.uniform(-0.1, 0.0)
    for paint in [colours.ink(), *colours.paints(bands - 1)]:
        width = dice.uniform(0.075, 0.115)
        middle = float32(at + width / 2)
        canvas.fill(canvas.ramp(np.abs(s - middle) - float32(width / 2)), paint)
        at += width
        if dice.chance(0.25):
            at += dice.uniform(0.03, 0.05)


def _pointillism(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """Seurat: a lattice of dots, shading outwards from a bright centre."""
    canvas.flood(colours.paper())
    across = dice.uniform(6.0, 7.5)
    shift_x, shift_y = dice.uniform(0.0, 1.0), dice.uniform(0.0, 1.0)
    fy = canvas.y * float32(across) + float32(shift_y)
    row = np.floor(fy).astype(np.intp)
    indent = (row % 2).astype(float32) * float32(0.5)
    fx = canvas.x * float32(across) + float32(shift_x) + indent
    column = np.floor(fx).astype(np.intp)
    n = int(across) + 3
    loose = dice.array(2, n, n).astype(float32) * float32(0.1) - float32(0.05)
    dx = fx - column.astype(float32) - float32(0.5) - loose[0][row, column]
    dy = fy - row.astype(float32) - float32(0.5) - loose[1][row, column]
    size = dice.uniform(0.36, 0.43)
    glow_x, glow_y = dice.uniform(0.2, 0.8) * across, dice.uniform(0.2, 0.8) * across
    grid = np.arange(n, dtype=float32)
    gx, gy = grid[None, :] - float32(glow_x), grid[:, None] - float32(glow_y)
    # Colours are dithered, not mixed: each dot takes one of the two nearest paints at random.
    t = np.sqrt(gx * gx + gy * gy) * float32(3.2 / across) + dice.array(n, n) * 0.9
    ladder = np.stack([colours.accent(), *colours.paints(2), colours.ink()])
    shade = dice.array(n, n, 1).astype(float32) * float32(0.24) + float32(0.88)
    tints = ladder[np.minimum(np.floor(t), 3).astype(np.intp)] * shade
    cover = canvas.ramp((np.sqrt(dx * dx + dy * dy) - float32(size)) * float32(1 / across))
    canvas.fill(cover, np.moveaxis(tints[row, column], -1, 0))


def _zen_ink(canvas: Canvas, dice: Dice, colours: Colours) -> None:
    """An ensō: one brush-drawn circle with a gap, and a seal."""
    canvas.flood(colours.paper())
    cx, cy = dice.uniform(0.44, 0.56), dice.uniform(0.44, 0.56)
    size = dice.uniform(0.27, 0.34)
    u, v = canvas.turned(cx, cy, dice.uniform(0.0, 2 * math.pi))
    radius = np.sqrt(u * u + v * v)
    facing = u / np.maximum(radius, float32(1e-6))
    beside = v / np.maximum(radius, float32(1e-6))
    # Ink left on the brush: none in the gap, and less on one side.
    left = facing + float32(dice.uniform(0.82, 0.94))
    hand = float32(dice.uniform(0.15, 0.35) * (1 if dice.chance(0.5) else -1))
    weight = np.clip(left * float32(2.2), -0.2, 0.8) + hand * beside * np.minimum(left, 1.0)
    away = radius - float32(size) - float32(dice.uniform(-0.05, 0.05)) * beside
    half = float32(dice.uniform(0.045, 0.07)) * weight
    bristle = away * float32(dice.uniform(70.0, 90.0))
    dry = np.abs(bristle - np.floor(bristle) - float32(0.5)) * 2.0
    wet = np.clip(weight * 3.0 - dry * 0.9, 0.0, 1.0)
    canvas.fill(canvas.ramp(np.abs(away) - half) * wet, colours.ink())
    edge = dice.uniform(0.05, 0.07)
    x, y = (0.86 if dice.chance(0.5) else 0.14), dice.uniform(0.82, 0.88)
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
        number = -1
    if number < 0:
        raise UserError(f"index is {index!r}; expected an integer of 0 or more")
    return number


def _width_height(size: int | tuple[int, int]) -> tuple[int, int]:
    try:
        width, height = map(operator.index, size if isinstance(size, tuple) else (size, size))
    except (TypeError, ValueError):
        width = height = 0
    if not (1 <= width <= MAX_SIZE and 1 <= height <= MAX_SIZE):
        raise UserError(
            f"size is {size!r}; expected a whole number of pixels from 1 to {MAX_SIZE}, "
            "or a pair (width, height) of them"
        )
    return width, height


def labels_of(index: int) -> dict[str, int]:
    """Return the labels of the painting with this index, as ids into `LABEL_NAMES`.

    With S schools and P palettes and k = index mod (S * P), the school is k mod S and the palette
    (k // S + k mod S) mod P: a permutation of all pairs. So S consecutive indices from a multiple
    of S have each school once, and S * P consecutive ones each pair once.

    Args:
        index: Number of the painting, 0 or more.

    Returns:
        `{"style": school id, "genre": palette id}`.

    Raises:
        UserError: The index is not an integer of 0 or more.
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
        index: Number of the painting, 0 or more.
        size: Side of a square picture in pixels, or (width, height). The longer side spans the
            painting; the shorter one shows its centre.
        style: School, by name or id; None takes that of `labels_of`.
        genre: Palette, by name or id; None takes that of `labels_of`.

    Returns:
        An RGB image of width × height pixels, the same bytes for the same arguments.

    Raises:
        UserError: The index is not an integer of 0 or more, a side is not from 1 to `MAX_SIZE`, or
            the school or palette is unknown.
    """
    number = _checked_index(index)
    labels = labels_of(number)
    school = labels["style"] if style is None else resolve_label(SCHOOLS, style, "style")
    palette = labels["genre"] if genre is None else resolve_label(PALETTES, genre, "genre")
    width, height = _width_height(size)
    longest = max(width, height)

    def ticks(count: int) -> Field:
        place = (np.arange(count * _SUPERSAMPLE) + 0.5) / (longest * _SUPERSAMPLE)
        return (place + (longest - count) / (2 * longest)).astype(float32)

    x, y = ticks(width)[None, :], ticks(height)[:, None]
    rows = _SUPERSAMPLE * max(1, _BAND_SAMPLES // (x.size * _SUPERSAMPLE))
    picture = np.empty((height, width, 3), np.uint8)
    for top in range(0, y.size, rows):
        canvas = Canvas(x, y[top : top + rows], 1.0 / (longest * _SUPERSAMPLE))
        dice = Dice(1, school, 0, number)
        colours = Colours(_PALETTES[PALETTES[palette]], Dice(2, school, palette, number))
        _PAINTERS[SCHOOLS[school]](canvas, dice, colours)
        # Uneven light: brightness changes slowly from one side to the other.
        lit = 1.0 + float32(dice.uniform(-0.1, 0.1)) * (canvas.x - float32(0.5))
        lit = lit + float32(dice.uniform(-0.1, 0.1)) * (canvas.y - float32(0.5))
        fine = np.clip(canvas.rgb * lit, 0.0, 1.0)
        mean = (fine[:, ::2, ::2] + fine[:, 1::2, ::2]) + (fine[:, ::2, 1::2] + fine[:, 1::2, 1::2])
        levels = np.floor(mean * float32(255 / 4) + float32(0.5)).astype(np.uint8)
        start = top // _SUPERSAMPLE
        picture[start : start + levels.shape[1]] = np.moveaxis(levels, 0, -1)
    return Image.fromarray(picture)
