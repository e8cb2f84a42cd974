"""Damaged checkpoints of both packages are not used; the run resumes from the intact one before."""

import pytest

from inl_core.run import checkpoints
from inl_core.run.errors import UserError


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def checkpoints_of(run):
    return checkpoints.all_checkpoints(run / "checkpoints")


def test_the_checksums_cover_every_file(package, finished):
    for checkpoint in checkpoints_of(finished):
        listed = (checkpoint / "SHA256SUMS").read_text().splitlines()[1:]
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        names = {path.relative_to(checkpoint).as_posix() for path in files} - {"SHA256SUMS"}
        assert {line.split("  ", 1)[1] for line in listed} == names
        assert {package.STATE_FILE, "model.safetensors"} <= {path.name for path in files}
        assert checkpoints.find_damage(checkpoint) == []


def test_the_intact_checkpoint_before_gives_the_same_bits(package, finished, resumed):
    expected = package.outcome(finished)
    first, second = checkpoints_of(finished)
    flip_a_bit(second / "model.safetensors")
    with pytest.raises(
        UserError,
        match=r"step-00000008 is damaged: model.safetensors is not .*--resume \S*step-00000004",
    ):
        resumed(finished)
    resumed(finished, first)
    assert package.outcome(finished) == expected
    assert (second.parent / "step-00000008.damaged").is_dir()  # kept for the user to decide


def test_a_damaged_checkpoint_is_not_sampled_from(package, finished):
    checkpoint = checkpoints_of(finished)[-1]
    package.use(checkpoint)
    weights = max(checkpoint.glob("**/*model.safetensors"), key=lambda path: len(path.parts))
    flip_a_bit(weights)
    with pytest.raises(
        UserError, match=rf"step-00000008 is damaged: \S*{weights.name} is not what was"
    ):
        package.use(checkpoint)


def test_a_checkpoint_without_checksums_is_resumed(package, finished, resumed):
    for checkpoint in checkpoints_of(finished):
        (checkpoint / "SHA256SUMS").unlink()
    resumed(finished, steps=9)
    assert checkpoints_of(finished)[-1].name == "step-00000009"
