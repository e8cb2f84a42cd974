"""ComplexityDiT: a diffusion transformer with INL dynamics, as a diffusers pipeline."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from complexity_dit.autoencoder import TinyAutoencoder
    from complexity_dit.config import TrainConfig
    from complexity_dit.interpolation import interpolate
    from complexity_dit.pipeline import ComplexityDiTPipeline
    from complexity_dit.pipeline_img2img import ComplexityDiTImg2ImgPipeline
    from complexity_dit.pipeline_inpaint import ComplexityDiTInpaintPipeline
    from complexity_dit.transformer import ComplexityDiTTransformer2DModel
    from inl_core.run.errors import UserError

__version__ = "0.1.0"

# Importing diffusers takes seconds: `import complexity_dit` and `--help` should not.
_HOMES = {
    "ComplexityDiTImg2ImgPipeline": "complexity_dit.pipeline_img2img",
    "ComplexityDiTInpaintPipeline": "complexity_dit.pipeline_inpaint",
    "ComplexityDiTPipeline": "complexity_dit.pipeline",
    "ComplexityDiTTransformer2DModel": "complexity_dit.transformer",
    "TinyAutoencoder": "complexity_dit.autoencoder",
    "TrainConfig": "complexity_dit.config",
    "UserError": "inl_core.run.errors",
    "interpolate": "complexity_dit.interpolation",
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
