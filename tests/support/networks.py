"""Small networks whose every weight affects the output."""

import torch
from diffusers import AutoencoderKL

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def small_network(seed: int = 0, **overrides) -> ComplexityDiTTransformer2DModel:
    """Two blocks on 16 tokens, newly initialised."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
        "label_fields": ["style", "genre"], "num_classes": [3, 2],
    }  # fmt: skip
    return ComplexityDiTTransformer2DModel(**(settings | overrides)).eval()


@torch.no_grad()
def randomised(
    model: ComplexityDiTTransformer2DModel, seed: int = 1
) -> ComplexityDiTTransformer2DModel:
    """Replace the zeros of AdaLN-Zero, with which the output does not depend on the blocks."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "adaln" in name or "proj_out" in name:
            p.normal_(std=0.1)
    return model


def small_vae(**overrides) -> AutoencoderKL:
    """A VAE with 3 latent channels that halves height and width."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, **overrides,
    ).eval()  # fmt: skip
