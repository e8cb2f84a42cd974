"""Any VAE that latents can come from: found by hub id or path, hashed, asked for its posterior."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from complexity_dit.hub import reach_hub
from complexity_dit.models.autoencoder import TinyAutoencoder
from inl_core.run.errors import UserError
from inl_core.run.json_files import read_json_object

Vae = AutoencoderKL | AutoencoderTiny | TinyAutoencoder

_CLASSES: dict[str, type[Vae]] = {
    cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny, TinyAutoencoder)
}
_FOLDER_HINT = "download it elsewhere and give the folder"


def load_vae(name: str) -> Vae:
    """Find a VAE and load it in fp32, in eval mode, without gradients.

    Args:
        name: A folder or hub id with the `config.json` of an `AutoencoderKL`, `AutoencoderTiny` or
            `TinyAutoencoder`, or with such a VAE in its sub-folder `vae`; or a folder with the two
            files of a TAESD-family release, such as TAEF2.

    Raises:
        UserError: If there is none, or it is of another class, or it cannot be loaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        has_config = (folder / "config.json").is_file() or (folder / "vae").is_dir()
        if not has_config and any(folder.glob("*encoder*")):
            return TinyAutoencoder.from_taesd(folder).requires_grad_(False)
        name = str(folder)
    elif name.count("/") != 1 or name.startswith((".", "~")):
        raise UserError(f"there is no VAE folder {name}; give an existing folder or a hub id")
    else:
        reach_hub(f"vae {name}", _FOLDER_HINT)
    config, subfolder = _config_of(name)
    found = config.get("_class_name")
    if found not in _CLASSES:
        raise UserError(f"the VAE {name} is a {found}; latents can come from {', '.join(_CLASSES)}")
    try:
        vae = _CLASSES[found].from_pretrained(
            name, subfolder=subfolder, torch_dtype=torch.float32, use_safetensors=True
        )
    # diffusers checks few of the values of a config.json: what it raises then is of any type.
    except Exception as error:
        raise UserError(f"cannot load the VAE {name}: {type(error).__name__}: {error}") from error
    return vae.eval().requires_grad_(False)


def _config_of(name: str) -> tuple[dict, str | None]:
    """The config of a VAE, and in which sub-folder it is."""
    said = "no config.json"
    for subfolder in (None, "vae"):
        path = Path(name, subfolder or "", "config.json")
        try:
            if not Path(name).is_dir():
                path = Path(hf_hub_download(name, "config.json", subfolder=subfolder))
            if path.is_file():
                return read_json_object(path), subfolder
        except (HfHubHTTPError, OSError, ValueError) as error:
            said = str(error).splitlines()[0]
    raise UserError(f"no VAE in {name} ({said}); {_FOLDER_HINT}")


def scale_factor(vae: Vae) -> int:
    """How many times smaller a latent is than its image, on each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def posterior(vae: Vae, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a VAE makes of images in [-1, 1], (B, 3, Y, X).

    Returns:
        The mean, (B, C, Y / f, X / f), unscaled, and the standard deviation of the same shape, or
        None for an autoencoder that has none.
    """
    out = vae.encode(images)
    distribution = getattr(out, "latent_dist", None)
    if distribution is None:
        return out.latents, None
    return distribution.mean, distribution.std
