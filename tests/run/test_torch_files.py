"""Files of torch.save that claim more than they hold are refused before they are opened."""

import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint

from inl_core.run.errors import UserError
from inl_core.run.torch_files import check_torch_file, check_torch_files


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, data: bytes, method: int = zipfile.ZIP_STORED, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in {"data.pkl": data, "version": b"3\n", **files}.items():
            file.writestr(f"archive/{name}", content)
    return path


def with_storage(path: Path, numbers: int, stored: bytes) -> Path:
    """A state of one storage that claims `numbers` floats."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numbers) if value is path else None

    file = io.BytesIO()
    Pickler(file, 2).dump({"state": path})
    return archive(path, file.getvalue(), **{"data/0": stored})


def test_the_states_of_a_training_pass(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 3).bfloat16()
    optimizer = torch.optim.AdamW(network.parameters(), lr=torch.tensor(0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    network(torch.ones(1, 3).bfloat16()).sum().backward()
    optimizer.step()
    generators = {"python": random.getstate(), "numpy": np.random.get_state(),
                  "cpu": torch.get_rng_state(), "cuda": [torch.get_rng_state()]}  # fmt: skip
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(schedule.state_dict(), tmp_path / "scheduler.pt")
    torch.save(generators, tmp_path / "rng_state_0.pth")
    torch.save(torch.amp.GradScaler("cpu").state_dict(), tmp_path / "scaler.pt")
    torch.save(network.state_dict(), tmp_path / "weights.bin")
    check_torch_files(tmp_path)


def test_41_bytes_that_ask_for_60_gib_are_refused(tmp_path: Path) -> None:
    """The format before torch 1.6, which makes storages of the size that the pickle claims."""
    path = tmp_path / "optimizer.pt"
    storage = ("storage", torch.FloatStorage, "0", "cpu", 16 * 2**30)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return storage if value is path else None

    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {}):
            pickle.dump(value, file, 2)
        Pickler(file, 2).dump(path)
    with pytest.raises(UserError, match="not a state that"):
        check_torch_file(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Call(bytearray, 60 * 2**30), "names builtins.bytearray|names __builtin__.bytearray"),
        (Call(np.zeros(0).__reduce__()[0], np.ndarray, (10**12,), b"b"), "a size of its own"),
        (Call(os.system, "true"), r"names posix\.system"),
        (Call(torch.empty, (10**12,)), r"names torch.*empty|which is no part"),
    ],
)
def test_a_pickle_that_makes_its_own_sizes_or_objects_is_refused(
    tmp_path: Path, value: Call, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_torch_file(archive(tmp_path / "a.pt", pickle.dumps({"state": value}, 2)))


def test_a_storage_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    check_torch_file(with_storage(path, 4, bytes(16)))
    for numbers in (5, 10**12, -1):
        with pytest.raises(UserError, match="storage 0 claims"):
            check_torch_file(with_storage(path, numbers, bytes(16)))


def test_a_memo_of_any_index_takes_no_memory(tmp_path: Path) -> None:
    data = b"\x80\x02}r" + (2**32 - 1).to_bytes(4, "little") + b"."
    check_torch_file(archive(tmp_path / "a.pt", data))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: archive(path, pickle.dumps({}), zipfile.ZIP_DEFLATED),
        lambda path: archive(path, b"\x80\x02X\xff\xff\xff\x7fa."),
        lambda path: archive(path, b""),
        lambda path: archive(path, pickle.dumps({}), **{"b/data.pkl": b"."}),
        lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
        lambda path: path.write_bytes(b""),
        lambda path: os.mkfifo(path),
    ],
)
def test_bombs_pipes_and_damaged_files_are_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt is"):
        check_torch_files(tmp_path)


def test_a_distributed_checkpoint_is_refused_and_not_opened(tmp_path: Path) -> None:
    """torch opens its `.metadata` with pickle.load, and objects in `.distcp` too."""
    folder = tmp_path / "optimizer_0"
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.save({"a": torch.ones(2)}, checkpoint_id=folder)
    parts = sorted(path.name for path in folder.iterdir())
    assert parts == [".metadata", "__0_0.distcp"]
    for name in parts:
        with pytest.raises(UserError, match=f"{name} is a pickle, .*FULL_STATE_DICT"):
            check_torch_files(tmp_path)
        (folder / name).unlink()
    check_torch_files(tmp_path)


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "a.PICKLE", "last.ckpt", "a.PT"])
def test_other_pickles_of_a_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Call(os.system, "true")))
    with pytest.raises(UserError, match=f"{name} is "):
        check_torch_files(tmp_path)
