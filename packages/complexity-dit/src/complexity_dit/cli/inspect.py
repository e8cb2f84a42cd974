"""`complexity-dit inspect`: the contents of a pipeline or checkpoint, and its learned dynamics."""

from pathlib import Path
from typing import Any

import torch

from complexity_dit.config import DATA_FILE
from complexity_dit.hashing import weights_sha256
from complexity_dit.models.tokens import NUM_TRAIN_TIMESTEPS
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel, looped_blocks
from complexity_dit.models.vae import find_autoencoder, load_vae, scale_factor
from complexity_dit.pipelines.sampling import find_pipeline, load_pipeline
from inl_core import LoopedDynamics, certify, dynamics_modules, read_dynamics
from inl_core.run.json_files import read_json_object

PROBE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels t at which the dynamics are measured, on an input of pure noise without labels."""


def inspect(path: str) -> dict[str, Any]:
    """Describe a model, or the autoencoder of a folder that has no pipeline.

    Args:
        path: A path for `find_pipeline`, or a Hub id.

    Returns:
        Plain values: sizes, parameters, labels, the dynamics of each layer, the figures of
        `inl_core.certify`, the VAE and the training data.

    Raises:
        UserError: If there is no model at the path.
    """
    folder = find_pipeline(Path(path))
    if folder is None and (autoencoder := find_autoencoder(Path(path))) is not None:
        return _autoencoder(autoencoder)
    pipe = load_pipeline(str(folder) if folder else path)
    model, vae = pipe.transformer.eval(), pipe.vae
    trained_on = folder / DATA_FILE if folder else None
    return {
        "pipeline": str(folder or path),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sizes": {
            name: model.config[name]
            for name in (
                "hidden_size", "num_layers", "num_attention_heads", "patch_size", "sample_size",
                "in_channels", "network_output", "auxiliary_layer",
            )
        },
        **(
            {"loop": {k: v for k, v in model.config.items() if k == "num_loops" or "loop_" in k}}
            if looped_blocks(model.config)
            else {}
        ),
        "labels": {field: len(names) for field, names in pipe.label_names.items()},
        "scheduler": type(pipe.scheduler).__name__,
        "guidance": {n: list(v) if isinstance(v, tuple) else v for n, v in pipe.guidance.items()},
        "vae": None if vae is None else type(vae).__name__,
        **(
            {}
            if pipe.text_encoder is None
            else {
                "text_encoder": type(pipe.text_encoder).__name__,
                "prompt_length": pipe.config.prompt_length,
            }
        ),
        "dynamics": {k: v for k, v in model.config.items() if k.startswith("dynamics_")},
        **_dynamics(model),
        "trained_on": read_json_object(trained_on)
        if trained_on and trained_on.is_file()
        else None,
        "weights_sha256": weights_sha256(model),
    }  # fmt: skip


def _autoencoder(folder: Path) -> dict[str, Any]:
    """Sizes, scale, training data and measures of a trained autoencoder."""
    vae = load_vae(str(folder))
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    data, result = folder / DATA_FILE, folder.parent / "result.json"
    return {
        "autoencoder": str(folder),
        "class": type(vae).__name__,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "factor": scale_factor(vae),
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "measures": read_json_object(result)["metrics"] if result.is_file() else None,
        "trained_on": read_json_object(data) if data.is_file() else None,
        "weights_sha256": weights_sha256(vae),
    }


def _dynamics(model: ComplexityDiTTransformer2DModel) -> dict[str, Any]:
    """Statistics of each layer's dynamics on noise, and the stability certificate."""
    modules = dynamics_modules(model).values()
    if not modules:
        return {}
    side, count = model.config.sample_size, len(PROBE_LEVELS)
    noise = torch.randn(
        count, model.config.in_channels, side, side, generator=torch.Generator().manual_seed(0)
    )
    times = torch.tensor(PROBE_LEVELS) * NUM_TRAIN_TIMESTEPS
    labels = torch.full((count, len(model.config.label_fields)), -1)
    inputs = (noise, times, labels)
    in_layers = any(not isinstance(module, LoopedDynamics) for module in modules)
    return {
        "layers": {
            name: {key: round(value, 6) for key, value in stats.items()}
            for name, stats in read_dynamics(model, inputs).items()
        },
        **({"certificate": certify(model, inputs).summary()} if in_layers else {}),
    }
