"""Causal language models with INL dynamics, as transformers models.

Importing the package registers `DeepConfig`, `DeepModel` and `DeepForCausalLM` with transformers'
Auto classes. A folder that `save_pretrained` wrote also carries the code of the model, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works without this import.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from complexity_lm.configuration_complexity import PRESETS, DeepConfig
from complexity_lm.modeling_complexity import DeepForCausalLM, DeepModel
from complexity_lm.parameters import ParameterCount, count_parameters, decay_parameter_names

__version__ = "0.1.0"

AutoConfig.register(DeepConfig.model_type, DeepConfig, exist_ok=True)
AutoModel.register(DeepConfig, DeepModel, exist_ok=True)
AutoModelForCausalLM.register(DeepConfig, DeepForCausalLM, exist_ok=True)
DeepConfig.register_for_auto_class()
DeepModel.register_for_auto_class("AutoModel")
DeepForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "PRESETS",
    "DeepConfig",
    "DeepForCausalLM",
    "DeepModel",
    "ParameterCount",
    "__version__",
    "count_parameters",
    "decay_parameter_names",
]
