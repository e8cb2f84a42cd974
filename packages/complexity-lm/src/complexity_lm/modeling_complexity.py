"""The complexity language model: a decoder whose layers carry INL dynamics.

`DeepForCausalLM` is a transformers model; its velocity starts at zero for each token at the first
layer and lives through depth only, never from one token to the next.

Shape suffixes: B batch · N tokens · D hidden · V vocabulary; `h_BND` is of shape (B, N, D).

A saved model folder carries a copy of this file and of the siblings it imports; transformers finds
those by their relative imports.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from inl_core import RMSNorm
from inl_core.routing import RoutingPlan, make_routing_plan

from .attention_complexity import ComplexityAttention, DeepRotaryEmbedding
from .configuration_complexity import DeepConfig
from .layers_complexity import DeepDecoderLayer
from .pretrained_complexity import DeepPreTrainedModel

_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of each token given those before it, in nats.

    What transformers computes for causal language models, except that fp64 logits stay fp64.

    Args:
        logits: (B, N, vocabulary).
        labels: (B, N) token ids; the label of a position is the id that follows it.
        vocab_size: Size of the vocabulary.
        num_items_in_batch: Divisor of the sum, as `Trainer` gives it under gradient accumulation;
            `None` means the number of labels that count.
        ignore_index: Label that does not count.
        shift_labels: (B, N) labels already moved one to the left; `None` means made from `labels`.
        **kwargs: Ignored.

    Returns:
        A scalar.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    return fixed_cross_entropy(
        logits.reshape(-1, vocab_size), targets, num_items_in_batch, ignore_index
    )


class DeepModel(DeepPreTrainedModel):
    """The decoder without its head: token ids to normalised hidden states.

    With experts, `routing_table` holds the expert of each token id (V,).
    """

    routing_table: Tensor | None

    def __init__(self, config: DeepConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [DeepDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepRotaryEmbedding(config)
        # The expert of each token id: one table for all layers, saved with the weights.
        table = torch.empty(config.vocab_size, dtype=torch.long) if config.num_experts else None
        self.register_buffer("routing_table", table)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        routing_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: Token ids (B, N).
            attention_mask: (B, M) with 1 at tokens and 0 at padding; `None` means no padding. Or
                what `generate` prepared: ready masks by layer type.
            position_ids: Positions (B, N); `None` counts on from the cache.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: Embeddings (B, N, D) instead of `input_ids`.
            routing_ids: Token ids (B, N) that choose the experts; `None` means `input_ids`. A
                dense model needs none.
            use_cache: Whether to return the cache; `None` asks the config.
            **kwargs: `output_hidden_states`, `output_attentions`, and settings of the attention
                backend.

        Returns:
            `last_hidden_state` (B, N, D) and, if asked for, `past_key_values`, `hidden_states` and
            `attentions`.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds` are given, a routed model
                has no ids to route by, or an id is beyond the vocabulary (checked in eager mode on
                the CPU only: elsewhere the look would make the program wait for the device).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        plan = self._plan(input_ids, routing_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids[None]

        masks = attention_mask
        if not isinstance(masks, dict):
            masks = {
                kind: _MASKS[kind](
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
                for kind in set(self.config.layer_types or [])
            }
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        h_BND = inputs_embeds
        # Zero is `None`, which costs nothing. In training it is spelt out, so that the parameters
        # of the first layer that act on the velocity have a gradient (of zero) like all others:
        # DistributedDataParallel waits for each of them.
        has_velocity = self.config.dynamics_placement != "none"
        v_BND = torch.zeros_like(h_BND) if self.training and has_velocity else None
        assert self.config.layer_types is not None
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            h_BND, v_BND = layer(
                h_BND,
                v_BND,
                plan,
                attention_mask=masks[kind],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(h_BND),
            past_key_values=past_key_values if use_cache else None,
        )

    def _plan(
        self, input_ids: Tensor | None, routing_ids: Tensor | None, inputs_embeds: Tensor
    ) -> RoutingPlan | None:
        """Group the tokens of the batch by expert, once for all layers; `None` without experts."""
        table = self.routing_table
        if table is None:
            return None
        ids = input_ids if routing_ids is None else routing_ids
        if ids is None:
            raise ValueError(
                "this model routes each token by its id: give routing_ids (B, N) beside "
                f"inputs_embeds of shape {tuple(inputs_embeds.shape)}"
            )
        if ids.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"routing_ids of shape {tuple(ids.shape)} must be {tuple(inputs_embeds.shape[:2])},"
                " one id a token"
            )
        if table.shape != (self.config.vocab_size,):
            raise ValueError(
                f"the routing table is for {table.shape[0]} token ids, the vocabulary has "
                f"{self.config.vocab_size}: resize_token_embeddings changes both"
            )
        if ids is not input_ids:
            self._check_ids(ids)
        return make_routing_plan(table[ids], self.config.num_experts)

    def _check_ids(self, ids: Tensor) -> None:
        if torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is beyond the vocabulary of "
                f"{self.config.vocab_size} ids (0 to {self.config.vocab_size - 1}): do tokenizer "
                "and model belong together?"
            )


class DeepForCausalLM(DeepPreTrainedModel, GenerationMixin):
    """The decoder with an output head: next-token logits, loss, generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepConfig) -> None:
        super().__init__(config)
        self.model = DeepModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        routing_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits and, with labels, the loss; what is not named here is `DeepModel`'s.

        Args:
            input_ids: Token ids (B, N).
            attention_mask: (B, M), 1 at tokens and 0 at padding.
            position_ids: Positions (B, N).
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: Embeddings (B, N, D) instead of `input_ids`.
            routing_ids: Token ids (B, N) that choose the experts; `None` means `input_ids`.
            labels: Token ids (B, N), usually `input_ids` themselves: the shift by one happens here.
                -100 does not count.
            use_cache: Whether to return the cache.
            logits_to_keep: Only the last so many positions get logits, or those named by a tensor;
                0 means all.
            **kwargs: Also what the loss takes: `num_items_in_batch`, `shift_labels`.

        Returns:
            `logits` (B, N, V), `loss` (nats a token) if `labels` were given, and what the decoder
            returns.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            routing_ids=routing_ids,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        routing_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`: transformers', and the ids to route by.

        Args:
            input_ids: Ids so far; without the prompt's if that came as embeddings.
            *args: As in transformers.
            routing_ids: Ids (B, N) that the prompt is routed by; what is generated routes itself.
            past_key_values: Cache.
            inputs_embeds: Embeddings of the prompt.
            **kwargs: As in transformers.

        Returns:
            Arguments of `forward`.
        """
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            *args,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if routing_ids is not None:
            prompt = 0 if inputs_embeds is not None else routing_ids.shape[1]
            all_ids = torch.cat([routing_ids, input_ids[:, prompt:]], dim=1)
            fed = inputs["input_ids"]
            fed = inputs["inputs_embeds"] if fed is None else fed
            start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            inputs["routing_ids"] = all_ids[:, start : start + fed.shape[1]]
        return inputs


__all__ = [
    "ComplexityAttention",
    "DeepDecoderLayer",
    "DeepForCausalLM",
    "DeepModel",
    "DeepPreTrainedModel",
]
