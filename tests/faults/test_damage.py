"""Damaged checkpoints: truncated, bit-flipped, unreadable files are named, nothing is read."""

import errno
import os
import random
import subprocess

import pytest

from inl_core.run import checkpoints
from inl_core.run.errors import UserError
from support.disk import below, failing

DAMAGES = ["flip", "truncate", "empty", "remove"]


def damaged(path, how, chance):
    content = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
        return
    if how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content[: {"truncate": len(content) - 2, "empty": 0}.get(how)])


def checkpoints_of(package, run):
    return checkpoints.all_checkpoints(run / "checkpoints")


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damaged_file_is_named(package, finished, record_property, how):
    chance, injected = random.Random(how), 0
    checkpoint = checkpoints_of(package, finished)[-1]
    damage = checkpoints.damage
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert len(files) > 8
    for path in files:
        if path.name == "SHA256SUMS" and how == "remove":
            continue  # a checkpoint of before there were any
        whole = path.read_bytes()
        if not whole:
            continue
        damaged(path, how, chance)
        injected += 1
        found = damage(checkpoint)
        name = path.relative_to(checkpoint).as_posix()
        if path.name == "SHA256SUMS":
            assert found, f"{how} {name}"  # a file's sum, or its name, is another now
        else:
            assert len(found) == 1, f"{how} {name}"
            assert found[0].startswith(f"{name} is ")
        path.write_bytes(whole)
    assert damage(checkpoint) == []
    record_property("injected", injected)


def test_the_list_cut_at_a_line_is_noticed(package, finished, record_property):
    checkpoint = checkpoints_of(package, finished)[-1]
    sums = checkpoint / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        sums.write_text("".join(lines[:kept]))
        assert checkpoints.damage(checkpoint), kept
    record_property("injected", len(lines))


@pytest.mark.parametrize(
    "line", ["0" * 64 + "  /dev/zero", "0" * 64 + "  ../../elsewhere", "rubbish", "0" * 63 + "  a"]
)
def test_lists_of_others_are_not_followed(package, tmp_path, line):
    (tmp_path / "SHA256SUMS").write_text(f"# SHA-256 of 1 files\n{line}\n")
    found = checkpoints.damage(tmp_path)
    assert len(found) == 1
    assert "SHA256SUMS cannot be read" in found[0]


def test_coreutils_reads_the_list(package, finished):
    checkpoint = checkpoints_of(package, finished)[-1]
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=checkpoint, check=False).returncode == 0
    damaged(checkpoint / "model.safetensors", "flip", random.Random(0))
    done = subprocess.run(command, cwd=checkpoint, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "model.safetensors: FAILED" in done.stdout


def test_the_whole_one_before_is_offered_and_goes_on_to_the_same_bits(package, finished, resumed):
    wanted = package.outcome(finished)
    first, second = checkpoints_of(package, finished)
    damaged(second / "model.safetensors", "flip", random.Random(0))
    with pytest.raises(
        UserError,
        match=r"step-00000008 is damaged: model.safetensors is not .*--resume \S*step-00000004",
    ):
        resumed(finished)
    resumed(finished, first)
    assert package.outcome(finished) == wanted
    assert (second.parent / "step-00000008.damaged").is_dir()  # nothing is thrown away unasked


def test_no_whole_one_is_said_too(package, finished, resumed):
    for checkpoint in checkpoints_of(package, finished):
        damaged(checkpoint / package.STATE_FILE, "truncate", random.Random(0))
    with pytest.raises(UserError, match=r"damaged.*no whole one lies before it.*--out"):
        resumed(finished)


def test_going_back_behind_a_whole_one_is_still_refused(package, finished, resumed):
    first = checkpoints_of(package, finished)[0]
    with pytest.raises(UserError, match=r"later checkpoints.*step-00000008"):
        resumed(finished, first)


def test_a_damaged_checkpoint_is_not_sampled_from(package, finished):
    checkpoint = checkpoints_of(package, finished)[-1]
    package.use(checkpoint)
    weights = max(checkpoint.glob("**/*model.safetensors"), key=lambda path: len(path.parts))
    damaged(weights, "flip", random.Random(0))
    with pytest.raises(
        UserError, match=rf"step-00000008 is damaged: \S*{weights.name} is not what was"
    ):
        package.use(checkpoint)


def test_a_file_that_cannot_be_read_is_named(package, finished, resumed):
    second = checkpoints_of(package, finished)[-1]
    broken = below(second / "model.safetensors", errno.EIO, reads=True)
    with (
        failing(broken),
        pytest.raises(
            UserError,
            match=rf"model.safetensors cannot be read \({os.strerror(errno.EIO)}\).*step-00000004",
        ),
    ):
        resumed(finished)


def test_a_checkpoint_without_sums_is_as_before(package, finished, resumed):
    for checkpoint in checkpoints_of(package, finished):
        (checkpoint / "SHA256SUMS").unlink()
    resumed(finished, steps=9)
    assert checkpoints_of(package, finished)[-1].name == "step-00000009"
