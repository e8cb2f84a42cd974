"""The named sizes of `DeepConfig.from_preset`, from 15 million to 7 billion parameters.

Plain data without imports of ours: a saved model folder carries a copy beside the configuration.
"""

from typing import NamedTuple


class Preset(NamedTuple):
    """One size: widths in channels, counts of layers and heads, and the parameters they make.

    Attributes:
        millions: Parameters in millions, with the default vocabulary (32000) and dynamics. The
            names are the sizes with the paper's dynamics, whose controllers are up to 4.6 % more.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP that acts on one token.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads a layer.
        num_key_value_heads: Key and value heads a layer.
        tie_word_embeddings: Whether the output head shares the embedding table.
    """

    millions: float
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool

    def sizes(self) -> dict[str, int | bool]:
        """The fields of `DeepConfig` that make this size."""
        fields = self._asdict()
        del fields["millions"]
        return fields


# With experts the same row is the active size: the parameters that act on one token.
PRESETS: dict[str, Preset] = {
    #        millions  hidden    mlp  layers  heads  kv   tied
    "15m":  Preset(  14.5,    256,    768,      8,     4,  2,  True),
    "50m":  Preset(  49.5,    512,   1280,     12,     8,  4,  True),
    "150m": Preset( 144.6,    768,   1920,     20,    12,  4,  True),
    "350m": Preset( 337.6,   1024,   2688,     28,    16,  4,  True),
    "760m": Preset( 754.1,   1536,   4096,     28,    24,  8,  True),
    "1b":   Preset(1009.5,   2048,   5632,     20,    16,  8,  True),
    "3b":   Preset(3015.7,   3072,   8192,     28,    24,  8, False),
    "7b":   Preset(6982.3,   4096,  11776,     36,    32,  8, False),
}  # fmt: skip

__all__ = ["PRESETS", "Preset"]
