"""Feature networks of transformers (DINOv2, CLIP, ...) from a local folder, for Frechet distances.

What they measure is named after them (``fd_dinov2``) and never FID.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from complexity_dit.config import Dtype
from complexity_dit.inception import FeatureExtractor, sha256_of, torch_dtype
from complexity_dit.inception_net import check_images
from inl_core.run.errors import UserError
from inl_core.run.json_files import fits, read_json_object

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
        model = AutoModel.from_pretrained(folder, use_safetensors=True, **_AS_DATA)
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
