"""The discriminator of an autoencoder's training, and the losses that it is trained with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from complexity_dit.models.autoencoder import TinyAutoencoder


class PatchCritic(nn.Sequential):
    """A PatchGAN discriminator (Isola et al., arXiv 1611.07004): one logit for each patch.

    Norms are over groups of channels of one picture, so that no picture depends on its batch.

    Args:
        in_channels: Of the pictures.
        channels: Width of the first layer; each further one is twice as wide, at most 8 times.
        layers: Layers that halve the size.
    """

    def __init__(self, in_channels: int, channels: int, layers: int) -> None:
        modules: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for _ in range(layers - 1):
            before, width = width, min(2 * width, 8 * channels)
            modules += [
                nn.Conv2d(before, width, 4, 2, 1, bias=False),
                nn.GroupNorm(1, width),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*modules, nn.Conv2d(width, 1, 3, padding=1))


class AutoencoderAndCritic(ModelMixin, ConfigMixin):
    """Both networks of the training as one model: one optimizer, one file, one backward pass.

    Args:
        settings: Arguments of `TinyAutoencoder`.
        critic_channels: See `PatchCritic`.
        critic_layers: See `PatchCritic`.
    """

    _no_split_modules = None
    _repeated_blocks = TinyAutoencoder._repeated_blocks

    @register_to_config
    def __init__(
        self, settings: Mapping[str, Any], critic_channels: int = 32, critic_layers: int = 3
    ) -> None:
        super().__init__()
        self.autoencoder = TinyAutoencoder(**settings)
        channels: int = self.autoencoder.config["in_channels"]
        self.critic = PatchCritic(channels, critic_channels, critic_layers)

    def forward(self, pixels: Tensor, with_critic: bool) -> tuple[Tensor, Sequence[Tensor]]:
        """Reconstruct pictures in [-1, 1], (B, C, Y, X).

        Returns:
            The reconstruction, and with the critic its logits of the pictures and of their
            reconstructions, which are detached: that is the critic's own loss.
        """
        reconstruction = self.autoencoder(pixels).sample
        if not with_critic:
            return reconstruction, ()
        both = torch.cat([pixels, reconstruction.detach().to(pixels.dtype)])
        return reconstruction, self.critic(both).chunk(2)

    def judge(self, reconstruction: Tensor) -> Tensor:
        """The critic's logits, with gradients of the pictures and not of its weights."""
        weights = {name: value.detach() for name, value in self.critic.named_parameters()}
        return torch.func.functional_call(self.critic, weights, (reconstruction,))


def edge_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the differences of neighbouring pixels, (B, C, Y, X) each."""
    across = (x - y).diff(dim=-1).abs().mean()
    return across + (x - y).diff(dim=-2).abs().mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss (Lim & Ye, arXiv 1705.02894); it is 2 for logits of 0."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()
