"""Inputs for parsers: any bytes, files that were good before, JSON with odd values in it."""

import copy
import io
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "../../etc/passwd", "http://127.0.0.1:9/x", "<script>", "a\x00b", "\ud800"]
    ),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
"""A value that a file may hold where another one is expected."""


@st.composite
def mangled_bytes(draw: st.DrawFn, good: Sequence[bytes]) -> bytes:
    """Any bytes, or a good file with some of it changed, cut out, repeated or cut off."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 16))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            del data[at:]
        else:
            number = draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000]))
            data[at : at + 4] = struct.pack(draw(st.sampled_from(["<I", ">I"])), number)
    return bytes(data)


@st.composite
def mangled_values(draw: st.DrawFn, good: Sequence[Any]) -> Any:
    """A good value of dicts and lists with odd values put in, and keys lost, renamed or added."""
    whole = [copy.deepcopy(draw(st.sampled_from(good)))]
    for _ in range(draw(st.integers(0, 3))):
        place: Any = whole
        key: Any = 0
        while isinstance(inner := place[key], dict | list) and inner and draw(st.integers(0, 4)):
            place = inner
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            key = draw(st.sampled_from(keys))
        kind = draw(st.integers(0, 4))
        if kind == 0 and place is not whole:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[draw(st.text(max_size=8))] = place[key]
        elif kind == 2 and place is not whole and isinstance(place, list):
            place.append(draw(ODD))
        else:
            place[key] = draw(ODD)
        if not place or (place is whole and not isinstance(whole[0], dict | list)):
            break
    return whole[0]


@st.composite
def mangled_json(draw: st.DrawFn, good: Sequence[Any]) -> bytes:
    """A file of JSON: with odd values, with broken bytes, nested deeply, or with a key twice."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(mangled_bytes([json.dumps(value).encode() for value in good]))
    if kind == 1:
        depth = draw(st.sampled_from([10, 100, 1000, 100_000]))
        opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]))
        return opening * depth + b"0" + closing * depth
    if kind == 2:
        text = json.dumps(draw(mangled_values(good)))
        return (text[:1] + '"a": 1, "a": NaN, ' + text[1:]).encode()
    return json.dumps(draw(mangled_values(good))).encode()


def png_bytes(size: int = 8, mode: str = "RGB", **options: Any) -> bytes:
    """A picture as the bytes of a PNG."""
    return picture_bytes("PNG", size, mode, **options)


def picture_bytes(kind: str, size: int = 8, mode: str = "RGB", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format=kind, **options)
    return file.getvalue()


def npz_bytes(compressed: bool = False, **arrays: Any) -> bytes:
    """Arrays as the bytes of an .npz."""
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()
