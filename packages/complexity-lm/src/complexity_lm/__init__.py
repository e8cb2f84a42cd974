"""Causal language models with INL dynamics.

Only the configuration exists so far: `DeepConfig`, registered with `AutoConfig` under
"complexity-deep". The model, its training and its commands are not here yet.
"""

from transformers import AutoConfig

from complexity_lm.configuration_complexity import DeepConfig

__version__ = "0.1.0"

AutoConfig.register(DeepConfig.model_type, DeepConfig, exist_ok=True)

__all__ = ["DeepConfig", "__version__"]
