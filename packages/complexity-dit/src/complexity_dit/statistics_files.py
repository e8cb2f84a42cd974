"""Kept statistics (mu, sigma, n) as .npz: ours, which say what they were made with, and others'."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from complexity_dit.metrics import Float64, Statistics
from inl_core.run.errors import UserError
from inl_core.run.files import file_aside

UNPACKED_LIMIT = 4 * 2**30
"""Bytes of arrays that one file may unpack to; a small file may claim any number."""

IDENTITY_KEYS = ("name", "weights_sha256", "resize", "dtype")


@dataclass(frozen=True)
class KeptStatistics:
    """Statistics as a file holds them.

    Attributes:
        statistics: Of the features distances are measured in; n is 0 where the file has none.
        spatial: Of the spatial features of sFID, where the file has them.
        identity: The extractor that made them (`FeatureExtractor.identity`); empty in files of
            other programs, which do not say.
        fingerprint: Of the images they were made of; empty where not said.
    """

    statistics: Statistics
    spatial: Statistics | None = None
    identity: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""


def write_statistics(path: Path, kept: KeptStatistics) -> None:
    """Write statistics with what they were made with, whole or not at all."""
    arrays: dict[str, Any] = dict(kept.statistics._asdict())
    if kept.spatial:
        arrays |= {"mu_s": kept.spatial.mu, "sigma_s": kept.spatial.sigma}
    with file_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays, **kept.identity, fingerprint=kept.fingerprint)


def read_statistics(path: Path) -> KeptStatistics:
    """Read ``mu`` (D,) and ``sigma`` (D, D), and what else the file says.

    pytorch-fid's files hold no more than these two; ADM's add ``mu_s`` and ``sigma_s`` of the
    spatial features; ours add n, the extractor and the fingerprint of the images.

    Raises:
        UserError: No such file, or arrays that are missing, do not fit or are not finite.
    """
    arrays = read_arrays(
        path, ("mu", "sigma", "mu_s", "sigma_s", "n", "fingerprint", *IDENTITY_KEYS)
    )
    missing = sorted({"mu", "sigma"} - set(arrays))
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; expected statistics (mu, sigma and, if known, n) "
            "or images (arr_0, uint8 NHWC)"
        )
    n = arrays.get("n", np.array(0))
    if n.size != 1 or n.dtype.kind not in "iuf" or not 0 <= n.item() < 2**63:
        raise UserError(f"{path} holds n as {n.dtype} of shape {n.shape}; expected one number")
    main = _checked(path, arrays["mu"], arrays["sigma"], int(n.item()))
    spatial = None
    if {"mu_s", "sigma_s"} <= set(arrays):
        spatial = _checked(path, arrays["mu_s"], arrays["sigma_s"], main.n)
    identity = {key: str(arrays[key]) for key in IDENTITY_KEYS if key in arrays}
    if identity and len(identity) < len(IDENTITY_KEYS):
        lost = sorted(set(IDENTITY_KEYS) - set(identity))
        raise UserError(f"{path} names its extractor without {', '.join(lost)}; make it again")
    return KeptStatistics(main, spatial, identity, str(arrays.get("fingerprint", "")))


def read_arrays(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Those arrays of an .npz that are asked for; no pickle is opened.

    Raises:
        UserError: No such file, it is no whole .npz, or it unpacks to more than `UNPACKED_LIMIT`.
    """
    try:
        # Opened here because np.load leaks the handle of a broken zip.
        with path.open("rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, NpzFile):
                return {}
            wanted = [name for name in names if name in file.files]
            assert file.zip is not None  # it is open
            members = file.zip.infolist()
            # No member gives more bytes than its entry says: zipfile stops there.
            sizes = {info.filename: info.file_size for info in members}
            size = sum(sizes.get(f"{name}.npy", sizes.get(name, 0)) for name in wanted)
            if size > UNPACKED_LIMIT:
                raise UserError(
                    f"{path} unpacks to {size / 2**30:.1f} GiB and at most "
                    f"{UNPACKED_LIMIT / 2**30:g} are read at once; images that numpy.savez stores "
                    "uncompressed are read one by one"
                )
            arrays = {name: file[name] for name in wanted}
            # Of a member that does not begin as an array numpy gives the bytes.
            if lost := [name for name, found in arrays.items() if isinstance(found, bytes)]:
                raise UserError(f"{path} cannot be read as .npz ({', '.join(lost)}: no array)")
            return arrays
    except UserError:
        raise
    # zipfile, zlib and numpy raise almost anything on broken bytes (NotImplementedError for an
    # unknown compression, RuntimeError for a password, MemoryError for an impossible shape, …).
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if "allow_pickle" in said or "Object arrays" in said:
            said = "it holds Python objects as a pickle, which is not opened"
        raise UserError(f"{path} cannot be read as .npz ({said})") from error


def _checked(path: Path, mu: Float64, sigma: Float64, n: int) -> Statistics:
    if mu.dtype.kind not in "iuf" or sigma.dtype.kind not in "iuf":
        raise UserError(
            f"{path} holds mu as {mu.dtype} and sigma as {sigma.dtype}; expected numbers"
        )
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise UserError(
            f"{path} holds mu {mu.shape} and sigma {sigma.shape}; expected (D,) and (D, D)"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} holds values that are not finite; make the statistics again")
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), n)
