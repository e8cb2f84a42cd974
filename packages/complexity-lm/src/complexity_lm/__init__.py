"""Causal language models with INL dynamics, as transformers models.

Importing the package registers `DeepConfig` and its models with transformers' Auto classes. A saved
folder also carries the code of the model, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works without this import.
"""

# ruff: noqa: E402
from inl_core.run.threads import set_threads_of

set_threads_of("complexity-lm", "complexity_lm")  # before the imports below load torch

from transformers import AutoConfig

from complexity_lm.configuration_complexity import PRESETS, DeepConfig
from complexity_lm.modeling_complexity import (
    DeepForCausalLM,
    DeepForQuestionAnswering,
    DeepForSequenceClassification,
    DeepForTokenClassification,
    DeepModel,
)
from complexity_lm.parameters import ParameterCount, count_parameters, decay_parameter_names

__version__ = "0.1.0"

AutoConfig.register(DeepConfig.model_type, DeepConfig, exist_ok=True)
DeepConfig.register_for_auto_class()

__all__ = [
    "PRESETS",
    "DeepConfig",
    "DeepForCausalLM",
    "DeepForQuestionAnswering",
    "DeepForSequenceClassification",
    "DeepForTokenClassification",
    "DeepModel",
    "ParameterCount",
    "__version__",
    "count_parameters",
    "decay_parameter_names",
]
