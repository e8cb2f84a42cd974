"""ComplexityDiT: a diffusion transformer with INL dynamics, as a diffusers pipeline."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from complexity_dit.config import TrainConfig
    from complexity_dit.models.autoencoder import TinyAutoencoder
    from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
    from complexity_dit.pipelines.image_to_image import (
        ComplexityDiTImg2ImgPipeline,
        ComplexityDiTInpaintPipeline,
        interpolate,
    )
    from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
    from inl_core.run.errors import UserError

__version__ = "0.1.0"

# Importing diffusers takes seconds: `import complexity_dit` and `--help` should not.
_HOMES = {
    "ComplexityDiTImg2ImgPipeline": "complexity_dit.pipelines.image_to_image",
    "ComplexityDiTInpaintPipeline": "complexity_dit.pipelines.image_to_image",
    "ComplexityDiTPipeline": "complexity_dit.pipelines.pipeline",
    "ComplexityDiTTransformer2DModel": "complexity_dit.models.transformer",
    "TinyAutoencoder": "complexity_dit.models.autoencoder",
    "TrainConfig": "complexity_dit.config",
    "UserError": "inl_core.run.errors",
    "interpolate": "complexity_dit.pipelines.image_to_image",
}

__all__ = [
    "ComplexityDiTImg2ImgPipeline",
    "ComplexityDiTInpaintPipeline",
    "ComplexityDiTPipeline",
    "ComplexityDiTTransformer2DModel",
    "TinyAutoencoder",
    "TrainConfig",
    "UserError",
    "__version__",
    "interpolate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
