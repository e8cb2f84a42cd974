"""The feature network of FID and KID: Inception-v3 as TensorFlow released it on 2015-12-05.

A plain module of our own, cut at the last pooling layer (2048 numbers an image), with that graph's
departures from the published Inception-v3, built from one table that also carries each layer's
name in the two kinds of weight files. `complexity_dit.inception` finds and loads the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from complexity_dit.config import Resize
from inl_core.run.errors import UserError

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
