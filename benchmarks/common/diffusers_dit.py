"""diffusers' DiT with the interface of our image model, for the same training loop and pipeline.

The initialisation, which the class leaves to its user, is that of the DiT paper (Peebles & Xie,
arXiv 2212.09748), with AdaLN-Zero. Two behaviours of the class are switched off: it drops labels
itself, separately in every block and from the global generator (here the loop drops them, by seed
and step), and it predicts a variance (here `out_channels` equals `in_channels`).
"""

from typing import ClassVar

import torch
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from complexity_dit.training.network import build_model


class DiffusersDiT(ModelMixin, ConfigMixin):
    """`DiTTransformer2DModel` with the arguments and config fields of our transformer."""

    _repeated_blocks: ClassVar = ["BasicTransformerBlock"]  # for `compile: regional`

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        label_fields: tuple[str, ...],
        num_classes: tuple[int, ...],
    ):
        super().__init__()
        if len(label_fields) != 1:
            raise ValueError(f"DiT supports one label field, got {list(label_fields)}")
        self.dit = DiTTransformer2DModel(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=hidden_size // num_attention_heads,
            num_layers=num_layers,
            num_embeds_ada_norm=num_classes[0],
        )
        self._init_weights()

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.dit.pos_embed.proj
        nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
        nn.init.zeros_(patches.bias)
        for block in self.dit.transformer_blocks:
            embed = block.norm1.emb
            embed.class_embedder.dropout_prob = 0.0
            nn.init.normal_(embed.class_embedder.embedding_table.weight, std=0.02)
            nn.init.normal_(embed.timestep_embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embed.timestep_embedder.linear_2.weight, std=0.02)
        zeros = [block.norm1.linear for block in self.dit.transformer_blocks]
        for zero in [*zeros, self.dit.proj_out_1, self.dit.proj_out_2]:
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(
        self, hidden_states, timestep, class_labels=None, kept_tokens=None, return_dict=True
    ):
        """As `ComplexityDiTTransformer2DModel.forward`; labels (B, 1) or None, -1 if missing."""
        if kept_tokens is not None:
            raise ValueError("DiT cannot drop tokens: set token_drop_rate to 0")
        batch, null = len(hidden_states), self.config.num_classes[0]
        if class_labels is None:
            class_labels = torch.full((batch, 1), -1, device=hidden_states.device)
        labels = class_labels.reshape(batch)
        sample = self.dit(
            hidden_states,
            timestep.expand(batch),
            torch.where(labels < 0, null, labels),
            return_dict=False,
        )[0]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def build_diffusers_dit(config, data):
    """The DiT with the width, depth, heads, patch size and labels that `build_model` would have."""
    shape = build_model(config, data).config
    names = (
        "sample_size", "patch_size", "in_channels", "hidden_size", "num_layers",
        "num_attention_heads", "label_fields", "num_classes",
    )  # fmt: skip
    torch.manual_seed(config.seed)
    return DiffusersDiT(**{name: shape[name] for name in names})
