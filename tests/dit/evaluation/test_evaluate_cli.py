"""`complexity-dit evaluate` and `compare` on the command line: exit statuses and messages."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline

pytestmark = pytest.mark.usefixtures("own_cache")


def write_set(folder: Path, n: int = 12, size: int = 16, seed: int = 0) -> Path:
    folder.mkdir()
    images = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    return folder


def broken_set(folder: Path, name: str, **fault: object) -> Path:
    """A set with one file that differs from the others."""
    write_set(folder)
    kind = fault["mode"]
    if kind == "size":
        Image.new("RGB", (9, 9)).save(folder / name)
    elif kind == "corrupt":
        (folder / name).write_bytes((folder / "00.png").read_bytes()[:200])
    else:
        Image.new(str(kind), (16, 16)).save(folder / name)
    return folder


BROKEN = [
    ("mixed sizes", "zz.png", "size", "make all images one size"),
    ("floats", "zz.tif", "F", "has floating-point pixels"),
    ("corrupt", "zz.png", "corrupt", "cannot be decoded"),
]


def bad_inputs(root: Path, pipe: ComplexityDiTPipeline) -> list[tuple[str, list[object], str]]:
    """(fault, command, part of the message) of everything that must be rejected."""
    good, real = write_set(root / "good"), write_set(root / "real", seed=1)
    one = write_set(root / "one", n=1)
    start = ["evaluate", good, "--reference", real, "--weights", "random", "--out", root / "out"]
    cases: list[tuple[str, list[object], str]] = [
        ("n < 2", [*start, "--num_images", 1], "num_images is 1"),
        ("one image", ["evaluate", one, *start[2:]], "holds 1 images"),
        ("no such reference", [*start[:3], root / "none", *start[4:]], "is not a folder"),
    ]
    for fault, name, mode, words in BROKEN:
        folder = broken_set(root / f"with {fault}", name, mode=mode)
        cases.append((fault, ["evaluate", folder, *start[2:]], words))
    np.savez(root / "nan.npz", arr_0=np.full((4, 16, 16, 3), np.nan, np.float32))
    cases.append(("NaN images", ["evaluate", root / "nan.npz", *start[2:]], "non-finite"))
    identity = {"name": "dinov2-32x2", "weights_sha256": "0", "resize": "x", "dtype": "float32"}
    np.savez(root / "other.npz", mu=np.zeros(256), sigma=np.eye(256), n=9, **identity)
    other = [*start[:3], root / "other.npz", *start[4:]]
    cases.append(("another extractor's statistics", other, "made with another extractor"))
    np.savez(root / "bare.npz", mu=np.zeros(256), sigma=np.eye(256))
    bare = [*start[:3], root / "bare.npz", *start[4:]]
    cases.append(("statistics that do not say", bare, "cannot be compared with features of random"))
    torch.save({"a": torch.zeros(1)}, root / "evil.pth")
    wrong = ["evaluate", good, "--reference", real, "--weights", root / "evil.pth"]
    cases.append(("weights of another hash", [*wrong, "--out", root / "w"], "it was not opened"))
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    pipe.save_pretrained(root / "nan pipeline")
    painting = ["evaluate", root / "nan pipeline", *start[2:-1], root / "painted"]
    cases.append(("NaN samples", [*painting, "--num_images", 4], "values that are not finite"))
    cases.append(("measures", [*start, "--measures", "[fid,ssim]"], "ssim"))
    return cases


def test_wrong_input_gives_status_2_and_a_message(
    command, pipe: ComplexityDiTPipeline, tmp_path: Path
) -> None:
    for fault, arguments, words in bad_inputs(tmp_path, pipe):
        status, _, err = command(*arguments)
        assert status == 2, (fault, err)
        assert words in err, (fault, err)
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_results_with_equal_settings_are_compared(command, tmp_path: Path) -> None:
    good, real = write_set(tmp_path / "good"), write_set(tmp_path / "real", seed=1)
    for name, extra in (("a", []), ("b", []), ("c", ["--seed", 1])):
        arguments = ["evaluate", good, "--reference", real, "--weights", "random", "--out"]
        status, text, _ = command(*arguments, tmp_path / name, "--bootstrap", 2, *extra)
        assert status == 0
        assert "absent" in text
    status, text, _ = command("compare", tmp_path / "a", tmp_path / "b" / "result.json")
    assert status == 0
    assert "fd_random" in text
    status, _, err = command("compare", tmp_path / "a", tmp_path / "c")
    assert status == 2
    assert "eval.seed: 0 and 1" in err
    status, text, _ = command("compare", tmp_path / "a", tmp_path / "c", "--allow", "[eval.seed]")
    assert status == 0
    assert "different by --allow: eval.seed" in text
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["settings"]["eval"]["num_images"] == 2048
