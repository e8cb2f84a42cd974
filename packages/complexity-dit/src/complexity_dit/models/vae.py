"""VAEs for latents: loading by Hub id or path, and the posterior of each class."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from complexity_dit.hub import reach_hub
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.models.loading import describe, load_weights
from inl_core.run.checkpoints import latest_checkpoint
from inl_core.run.errors import UserError
from inl_core.run.json_files import read_json_object

Vae = AutoencoderKL | AutoencoderTiny | TinyAutoencoder

_CLASSES: dict[str, type[Vae]] = {
    cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny, TinyAutoencoder)
}
_FOLDER_HINT = "download it elsewhere and pass the folder"


def load_vae(name: str) -> Vae:
    """Load a VAE in fp32, in eval mode, without gradients.

    Args:
        name: A folder or Hub id with the `config.json` of an `AutoencoderKL`, `AutoencoderTiny` or
            `TinyAutoencoder`, or with such a VAE in its sub-folder `vae`; or a folder with the two
            files of a TAESD-family release, such as TAEF2.

    Raises:
        UserError: If there is none, it is of another class, or it cannot be loaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        has_config = (folder / "config.json").is_file() or (folder / "vae").is_dir()
        if not has_config and any(folder.glob("*encoder*")):
            return TinyAutoencoder.from_taesd(folder).requires_grad_(False)
        name = str(folder)
    elif name.count("/") != 1 or name.startswith((".", "~")):
        raise UserError(f"there is no VAE folder {name}; pass an existing folder or a Hub id")
    else:
        reach_hub(f"vae {name}", _FOLDER_HINT)
    config, subfolder = _read_config(name)
    kind = config.get("_class_name")
    if kind not in _CLASSES:
        raise UserError(f"the VAE {name} is a {kind}; latents can come from {', '.join(_CLASSES)}")
    model: Any = _CLASSES[kind]
    try:
        vae = load_weights(
            model.from_pretrained, model.from_config, name,
            subfolder=subfolder, torch_dtype=torch.float32,
        )  # fmt: skip
    except Exception as error:  # of any type: diffusers checks few of the values of a config
        raise UserError(f"cannot load the VAE {name}: {describe(error)}") from error
    return vae.eval().requires_grad_(False)


def _read_config(name: str) -> tuple[dict, str | None]:
    """The config of a VAE and the sub-folder it is in."""
    message = "no config.json"
    for subfolder in (None, "vae"):
        path = Path(name, subfolder or "", "config.json")
        try:
            if not Path(name).is_dir():
                path = Path(hf_hub_download(name, "config.json", subfolder=subfolder))
            if path.is_file():
                return read_json_object(path), subfolder
        except (HfHubHTTPError, OSError, ValueError) as error:
            message = str(error).splitlines()[0]
    raise UserError(f"no VAE in {name} ({message}); {_FOLDER_HINT}")


def find_autoencoder(path: Path) -> Path | None:
    """The folder of an autoencoder: this one, its `vae`, or that of its newest checkpoint."""
    newest = latest_checkpoint(path / "checkpoints")
    for folder in (path, path / "vae", *([newest / "vae"] if newest else [])):
        try:
            if read_json_object(folder / "config.json").get("_class_name") in _CLASSES:
                return folder
        except (OSError, ValueError):
            continue
    return None


def scale_factor(vae: Vae) -> int:
    """Image size over latent size, per side."""
    if isinstance(vae, TinyAutoencoder):
        return vae.factor
    return 2 ** (len(vae.config.block_out_channels) - 1)


def posterior(vae: Vae, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encode images in [-1, 1], (B, 3, Y, X), to mean and standard deviation of the posterior.

    Both are (B, C, Y / f, X / f), unscaled; the second is None for an autoencoder without one.
    """
    out = vae.encode(images)
    distribution = getattr(out, "latent_dist", None)
    if distribution is None:
        return out.latents, None
    return distribution.mean, distribution.std
