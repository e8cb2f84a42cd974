"""The fixed random feature network that stands in where there are no Inception weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from complexity_dit.inception_net import check_images


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
