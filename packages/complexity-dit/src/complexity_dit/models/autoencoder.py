"""TinyAutoencoder: the TAESD family with the pooling branch of TAEF2.

TAESD (github.com/madebyollin/taesd, MIT) is a distilled autoencoder of plain 3x3 convolutions.
TAEF2, its member for FLUX.2's latents (32 channels, 8 times smaller), adds a normalised 1x1 branch
to the blocks of the coarsest stage, which diffusers' `AutoencoderTiny` does not have.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin  # noqa: F401 — ModelMixin: looked up by diffusers
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import AutoencoderMixin, AutoencoderTinyBlock, DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors import SafetensorError
from torch import Tensor, nn

from complexity_dit.models.loading import SafeModel, load_tensors
from inl_core.run.errors import UserError
from inl_core.run.files import read_bytes

_MAX_PICKLE_BYTES = 2**28

KNOWN_PICKLES = {
    "10a4e1021e89d7551eaf161352da8dbd0b1aa83872ae28b150c1df1ce2f147b6": "taef2_encoder.pth",
    "0a44a31e1ae59eb9dbf9359d24942fd3ef5928162c1800d97a28c61d51be0ab5": "taef2_decoder.pth",
}
"""sha256 of the release that is published as .pth only; no other .pth is opened."""


class TinyBlock(AutoencoderTinyBlock):
    """`relu(y + conv(y))` with y = x + pool(x): three 3x3 convolutions, and an optional pool."""

    def __init__(self, channels: int, pool_channels: int, pool_groups: int) -> None:
        super().__init__(channels, channels, "relu")
        self.pool = None
        if pool_channels:
            self.pool = nn.Sequential(
                nn.Conv2d(channels, pool_channels, 1, bias=False),
                nn.GroupNorm(pool_groups, pool_channels),
                nn.ReLU(),
                nn.Conv2d(pool_channels, channels, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.pool is None else x + self.pool(x))


class SoftClamp(nn.Module):
    """`bound * tanh(z / bound)`: keeps outliers in the range that the decoder was trained on."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, z: Tensor) -> Tensor:
        return self.bound * torch.tanh(z / self.bound)


class TinyAutoencoder(SafeModel, AutoencoderMixin, ConfigMixin):
    """A small autoencoder with the interface of diffusers' `AutoencoderTiny`.

    Layers are numbered as in the published files, which load without renaming. `enable_slicing`
    encodes and decodes one picture at a time; `enable_tiling` does so in squares of
    `tile_sample_min_size` pixels that overlap by a quarter and are blended. (Tiles of
    `AutoencoderTiny` are for 4 channels only.)

    Args:
        in_channels: Channels of an image.
        latent_channels: Channels of a latent.
        patch_size: Side of the square of pixels that is one cell of the first stage. With 2, no
            convolution runs at the size of the image, where most of the time would go.
        block_out_channels: Width of each stage, finest first; each stage after the first halves the
            size, so a latent is patch_size * 2^(stages - 1) times smaller than its image.
        layers_per_block: Blocks in each stage of the encoder, finest first.
        decoder_layers_per_block: Blocks in each stage of the decoder, coarsest first.
        pool_channels: Inner width of the pooling branch in the coarsest stage; 0 means no branch.
        pool_groups: Groups of its GroupNorm.
        latent_bound: The decoder gets `bound * tanh(z / bound)`.
        scaling_factor: As in diffusers: a model trains on (z - shift_factor) * scaling_factor.
        shift_factor: See `scaling_factor`.

    Raises:
        UserError: If the three lists differ in length, or a width is below 1.
    """

    shim: ClassVar[str] = "modeling_tiny_autoencoder"
    _no_split_modules: ClassVar[list[str]] = ["TinyBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["TinyBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        block_out_channels: Sequence[int] = (64, 64, 64, 64),
        layers_per_block: Sequence[int] = (1, 3, 3, 3),
        decoder_layers_per_block: Sequence[int] = (3, 3, 3, 1),
        pool_channels: int = 256,
        pool_groups: int = 4,
        latent_bound: float = 3.0,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        widths, stages = list(block_out_channels), len(block_out_channels)
        if not stages == len(layers_per_block) == len(decoder_layers_per_block):
            raise UserError(
                f"block_out_channels {widths}, layers_per_block {list(layers_per_block)} and "
                f"decoder_layers_per_block {list(decoder_layers_per_block)} must be of one length"
            )
        if min(latent_channels, in_channels, patch_size, *widths) < 1:
            raise UserError(
                f"latent_channels {latent_channels}, in_channels {in_channels}, patch_size "
                f"{patch_size} and block_out_channels {widths} must be at least 1"
            )
        inputs = in_channels * patch_size**2

        def blocks(stage: int, count: int) -> list[nn.Module]:
            pool = pool_channels if stage == stages - 1 else 0
            return [TinyBlock(widths[stage], pool, pool_groups) for _ in range(count)]

        layers: list[nn.Module] = [nn.PixelUnshuffle(patch_size)] if patch_size > 1 else []
        for stage, count in enumerate(layers_per_block):
            layers += [
                nn.Conv2d(widths[stage - 1], widths[stage], 3, stride=2, padding=1, bias=False)
                if stage
                else nn.Conv2d(inputs, widths[0], 3, padding=1)
            ]
            layers += blocks(stage, count)
        self.encoder = nn.Sequential(*layers, nn.Conv2d(widths[-1], latent_channels, 3, padding=1))

        layers = [SoftClamp(latent_bound), nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
        layers += [nn.ReLU()]
        for stage, count in zip(reversed(range(stages)), decoder_layers_per_block, strict=True):
            layers += blocks(stage, count)
            if stage:
                layers += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(widths[stage], widths[stage - 1], 3, padding=1, bias=False),
                ]
        layers += [nn.Conv2d(widths[0], inputs, 3, padding=1)]
        layers += [nn.PixelShuffle(patch_size)] if patch_size > 1 else []
        self.decoder = nn.Sequential(*layers)
        self.factor = patch_size * 2 ** (stages - 1)  # image size over latent size, per side
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = 512

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Encode images in [-1, 1], (B, C, Y, X), to latents (B, latent_channels, Y / f, X / f).

        f is patch_size * 2^(stages - 1), 8 for TAEF2. The encoder is deterministic: there is no
        posterior.
        """
        x = (x + 1) / 2  # the networks of the family take [0, 1]
        latents = self._in_parts(self.encoder, x, self.tile_sample_min_size, 1 / self.factor)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, latent_channels, Y, X) to images (B, C, f Y, f X), about in [-1, 1].

        Args:
            z: Latents as `encode` returns them.
            generator: Unused; part of the interface of diffusers' decoders.
            return_dict: False returns a plain tuple.
        """
        side = self.tile_sample_min_size // self.factor
        sample = self._in_parts(self.decoder, z, side, self.factor) * 2 - 1
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _in_parts(
        self, network: Callable[[Tensor], Tensor], x: Tensor, side: int, scale: float
    ) -> Tensor:
        """Apply a network to a batch, in slices and tiles if they are enabled."""
        whole = network
        if self.use_tiling and max(x.shape[-2:]) > side:
            whole = lambda part: in_tiles(network, part, side, scale)  # noqa: E731
        if not self.use_slicing:
            return whole(x)
        return torch.cat([whole(part) for part in x.split(1)])

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Reconstruct images in [-1, 1]."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)

    @classmethod
    def from_taesd(cls, folder: str | Path) -> "TinyAutoencoder":
        """Load the two files of a TAESD-family release: `*encoder*` and `*decoder*`.

        Widths, depths and the pooling branch are derived from the tensors. Files are
        `.safetensors`, or the `.pth` of TAEF2, which is published in no other form: it is opened
        only if its sha256 is known, with torch's tensors-only loader.

        Args:
            folder: The folder with the two files.

        Raises:
            UserError: If a file is missing, unknown, or has other tensors.
        """
        parts = {part: _read_part(Path(folder), part) for part in ("encoder", "decoder")}
        state = {f"{part}.{k}": v.float() for part, own in parts.items() for k, v in own.items()}
        try:
            model = cls(**_family_config(parts["encoder"], parts["decoder"]))
            model.load_state_dict(state)
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                f"{folder} is not an autoencoder of the TAESD family: {error}"
            ) from error
        return model.eval()


def in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, side: int, scale: float) -> Tensor:
    """Apply a network to overlapping squares of its input and blend what they give.

    Args:
        network: Maps (B, C, Y, X) to (B, C', scale Y, scale X).
        x: The input, (B, C, Y, X).
        side: Of a square; squares overlap by a quarter of it.
        scale: Size of the output over that of the input, per side.
    """
    step = side - side // 4
    tops, lefts = ([*range(0, max(n - side, 0), step), max(n - side, 0)] for n in x.shape[-2:])
    height, width = (int(n * scale) for n in x.shape[-2:])
    total, weight = torch.zeros(()), torch.zeros(())
    for top, left in itertools.product(tops, lefts):
        part = network(x[..., top : top + side, left : left + side])
        if not total.ndim:
            total = part.new_zeros(*part.shape[:2], height, width)
            weight = part.new_zeros(height, width)
        rows, columns = (slice(int(a * scale), int(a * scale) + n)
                         for a, n in zip((top, left), part.shape[-2:], strict=True))  # fmt: skip
        ramps = [_ramp(n, int(side * scale) // 4, part) for n in part.shape[-2:]]
        share = ramps[0][:, None] * ramps[1]
        total[..., rows, columns] += part * share
        weight[rows, columns] += share
    return total / weight


def _ramp(length: int, border: int, like: Tensor) -> Tensor:
    """1, 2, ..., border, ..., border, ..., 2, 1."""
    rising = torch.arange(1, length + 1, dtype=like.dtype, device=like.device)
    return torch.minimum(rising, rising.flip(0)).clamp(max=max(border, 1))


def _read_part(folder: Path, part: str) -> dict[str, Tensor]:
    paths = list(folder.glob(f"*{part}*.safetensors")) or list(folder.glob(f"*{part}*.pth"))
    if len(paths) != 1:
        raise UserError(
            f"{folder} has {len(paths)} files named *{part}*.safetensors (or .pth); expected one"
        )
    (path,) = paths
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        sha256 = hashlib.sha256(read_bytes(path, _MAX_PICKLE_BYTES, follow_links=True)).hexdigest()
        if sha256 not in KNOWN_PICKLES:
            raise UserError(
                f"{path} is a pickle with sha256 {sha256}, not one of the published "
                f"{', '.join(KNOWN_PICKLES.values())}; it was not opened. Give a .safetensors file"
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _family_config(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, Any]:
    """Widths and depths of a release, from the numbers of its layers.

    Keys such as `3.weight`, outside of any block, are the convolutions between stages.
    """

    def convolutions(tensors: dict[str, Tensor]) -> list[int]:
        names = (k.split(".") for k in tensors)
        return sorted(int(name[0]) for name in names if name[1:] == ["weight"])

    *starts, last = convolutions(encoder)
    widths = [encoder[f"{i}.weight"].shape[0] for i in starts]
    depths = [b - a - 1 for a, b in zip(starts, [*starts[1:], last], strict=True)]
    ends = convolutions(decoder)[1:]
    # Two stages of the decoder are separated by an upsampling and a convolution.
    begins = [3, *(end + 1 for end in ends[:-1])]
    finals = [end - 2 for end in ends[:-1]] + [ends[-1] - 1]
    pool = [v for k, v in encoder.items() if k.endswith("pool.0.weight")]
    return {
        "in_channels": encoder["0.weight"].shape[1],
        "latent_channels": encoder[f"{last}.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": depths,
        "decoder_layers_per_block": [f - b + 1 for b, f in zip(begins, finals, strict=True)],
        "pool_channels": pool[0].shape[0] if pool else 0,
    }
