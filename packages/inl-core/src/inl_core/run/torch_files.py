"""Files of `torch.save` that anyone may have written, checked before `torch.load` opens them.

`weights_only=True` runs no code, but it allocates the sizes that a file claims, also those that its
bytes cannot fill: 41 bytes ask for 60 GiB. The check follows the pickle with objects that do
nothing.
"""

import io
import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

from inl_core.run.errors import UserError
from inl_core.run.files import open_regular

SUFFIXES = frozenset({".pt", ".pth", ".bin"})
PICKLES = frozenset({".metadata", ".distcp", ".pkl", ".pickle", ".ckpt"})
"""Names or suffixes of files that a library opens with the whole pickle: `.metadata` and `.distcp`
of a distributed checkpoint, `custom_checkpoint_0.pkl` of accelerate."""
_MAX_PICKLE_BYTES = 64 * 2**20
_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1,
    "BoolStorage": 1,
}  # fmt: skip
"""Bytes of an element in the storages that the state of a training consists of."""
_KNOWN = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|_codecs\.encode"
    r"|numpy\._?core\.multiarray\._reconstruct|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+DType"
    rf"|torch\.({'|'.join(_BYTES)})"
)
"""What a state is built from: tensors, and the arrays of numpy's generator; no `bytearray`, which
takes a size. numpy's `_reconstruct` takes one too and is checked below."""


def check_torch_file(path: Path) -> None:
    """Refuse a file that claims more memory than it has bytes, or names other objects.

    Raises:
        UserError: Not a regular file, not in the zip format that `torch.save` has written since
            version 1.6, compressed, damaged, or claims sizes or objects as above.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        try:
            _check(zipfile.ZipFile(file), path.stat().st_size)
        except UserError:
            raise
        except Exception as error:  # pickle raises errors of any type
            reason = str(error) or type(error).__name__
            raise UserError(f"{path} is not a state that torch.save wrote: {reason}") from error


def check_torch_files(folder: Path) -> None:
    """Apply `check_torch_file` to all such files of a folder; refuse pickles, pipes and devices.

    Raises:
        UserError: Names the file.
    """
    for path in sorted(folder.rglob("*")):
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise UserError(f"{path} is a pipe or a device; expected a file")
        suffix = path.suffix.lower() or path.name.lower()  # ".metadata" has no suffix
        if suffix in PICKLES:
            raise UserError(
                f"{path} is a pickle, which can run code and is not opened; a checkpoint in parts "
                "(fsdp_state_dict_type SHARDED_STATE_DICT) is not resumed: save it with "
                "FULL_STATE_DICT"
            )
        if suffix in SUFFIXES:
            check_torch_file(path)


def _check(archive: zipfile.ZipFile, size: int) -> None:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise ValueError("two parts have one name")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries.values()) > size:
        raise ValueError("its parts are larger than the file")
    pickles = [name for name in entries if name.endswith("data.pkl")]
    if len(pickles) != 1 or entries[pickles[0]].file_size > _MAX_PICKLE_BYTES:
        raise ValueError("it does not have one data.pkl of at most 64 MiB")
    folder = pickles[0].removesuffix("data.pkl")
    stored = {
        name.removeprefix(f"{folder}data/"): entry.file_size
        for name, entry in entries.items()
        if name.startswith(f"{folder}data/")
    }
    _Inspector(archive.read(pickles[0]), stored).load()


class _Inert:
    """Takes the place of every object of a pickle."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> "_Inert":
        if self.name.endswith("_reconstruct") and args[1] != (0,):
            raise ValueError("it makes an array of a size of its own")
        return _Inert("")

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return self is other


class _Inspector(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Follows a pickle; in Python, because the one in C allocates the sizes that it reads."""

    def __init__(self, data: bytes, stored: dict[str, int]) -> None:
        super().__init__(io.BytesIO(data))
        self.stored = stored

    def find_class(self, module: str, name: str) -> _Inert:
        if not _KNOWN.fullmatch(f"{module}.{name}"):
            raise ValueError(f"it names {module}.{name}, which is no part of a training's state")
        return _Inert(name)

    def get_extension(self, code: int) -> None:
        raise ValueError("it names an extension of pickle")

    def persistent_load(self, pid: Any) -> _Inert:
        kind, storage, key, _, numbers = pid
        size = _BYTES[storage.name] * numbers
        if kind != "storage" or not isinstance(numbers, int) or not 0 <= size <= self.stored[key]:
            raise ValueError(f"storage {key} claims {numbers} numbers in {self.stored[key]} bytes")
        return _Inert("")
