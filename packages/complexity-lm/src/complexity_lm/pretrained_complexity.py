"""What the complexity models share: the start of their weights, loading, the routing table.

`DeepPreTrainedModel` is the base of `DeepModel` and `DeepForCausalLM`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inl_core import INLDynamics, INLDynamicsLite
from inl_core.routing import TokenRoutedMLP, build_routing_table

from .attention_complexity import ComplexityAttention
from .configuration_complexity import DeepConfig
from .layers_complexity import DeepDecoderLayer, start_dynamics


class DeepPreTrainedModel(PreTrainedModel):
    """What the complexity models share: the start of every weight, and what transformers asks."""

    config: DeepConfig
    config_class = DeepConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepDecoderLayer"]  # noqa: RUF012 — transformers' way to declare these
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepDecoderLayer,
        "attentions": ComplexityAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        """Start the weights of `module` that no checkpoint filled.

        Matrices and the embedding are normal with `initializer_range`; those that write to the
        residual stream are smaller by sqrt(2 · layers), as in GPT-2, so that the stream's variance
        does not grow with depth. Dynamics start at exactly the coefficients of the config.
        """
        residual_std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, (INLDynamics, INLDynamicsLite)):
            start_dynamics(module)
        elif isinstance(module, TokenRoutedMLP):
            for name, parameter in module.named_parameters(recurse=False):
                is_down = name in ("down", "shared_down")
                std = residual_std if is_down else self.config.initializer_range
                nn.init.normal_(parameter, std=std)
        elif isinstance(table := getattr(module, "routing_table", None), Tensor):
            _start_routing_table(table, self.config)
        elif getattr(module, "writes_to_stream", False):
            nn.init.normal_(module.weight, std=residual_std)  # pyright: ignore[reportArgumentType]
        else:
            super()._init_weights(module)

    @staticmethod
    def _load_pretrained_model(
        model: "DeepPreTrainedModel", state_dict: Any, files: Any, load_config: Any, *args: Any
    ) -> Any:
        """Load weights as transformers does; where shapes differ the error names them."""
        info, offloaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, files, load_config, *args
        )
        if info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            name, found, wanted = min(info.mismatched_keys)
            raise ValueError(
                f"the checkpoint is of another shape: {name} is {tuple(found)} there and "
                f"{tuple(wanted)} by the configuration, and {len(info.mismatched_keys) - 1} more; "
                "use the config.json that was saved with it"
            )
        return info, offloaded

    def balance_experts(self, counts: Tensor | Sequence[float]) -> None:
        """Spread the token ids over the experts so that each gets its share of a corpus.

        Made before training: it changes which expert a token goes to.

        Args:
            counts: How often each token id occurs in the corpus (V,).

        Raises:
            ValueError: The model has no experts, or `counts` are not those of its vocabulary.

        Warns:
            UserWarning: One id holds more than 1 / num_experts of the corpus; the message names it.
        """
        table = self.base_model.routing_table
        if not isinstance(table, Tensor):
            raise ValueError("balance_experts needs a model with experts, num_experts is 0")
        size, experts = self.config.vocab_size, self.config.num_experts
        table.copy_(build_routing_table(size, experts, "balanced", counts))
        self.config.routing_scheme = "balanced"

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the size of the vocabulary, as in transformers; the routing table follows.

        Ids that stay keep their expert; new ones go to id modulo `num_experts`.

        Args:
            *args: As in `PreTrainedModel.resize_token_embeddings`.
            **kwargs: Likewise.

        Returns:
            The embedding.
        """
        embedding = super().resize_token_embeddings(*args, **kwargs)
        table = self.base_model.routing_table
        if isinstance(table, Tensor):
            new = torch.arange(embedding.num_embeddings, device=table.device)
            new = new % self.config.num_experts
            new[: table.shape[0]] = table[: new.shape[0]]
            self.base_model.routing_table = new
        return embedding


def _start_routing_table(table: Tensor, config: DeepConfig) -> None:
    """Fill the table of a new model; one that a checkpoint filled stays."""
    if getattr(table, "_is_hf_initialized", False):
        return
    if config.routing_scheme == "balanced":
        raise ValueError(
            "a balanced routing table needs the token counts of a corpus: make the model with "
            "routing_scheme='modulo', then call model.balance_experts(counts)"
        )
    table.copy_(build_routing_table(config.vocab_size, config.num_experts))


__all__ = ["DeepPreTrainedModel"]
