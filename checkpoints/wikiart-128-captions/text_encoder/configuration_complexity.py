"""`DeepConfig`: the sizes and dynamics settings of a complexity language model, validated.

A saved model folder contains a copy of this file, so it imports nothing from this package.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import transformers
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.modeling_rope_utils import RopeParameters


class Preset(NamedTuple):
    """A named model size: fields of `DeepConfig`, and the parameters in millions.

    `millions` is with the default vocabulary (32000) and dynamics. The names give the size with the
    paper's dynamics, whose controllers add up to 4.6 %.
    """

    millions: float
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool


# With experts, a row describes the active size: the parameters that act on one token.
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


Placement = Literal["stream", "branch", "force", "force_mlp", "none"]
Adaptive = Literal["token", "channel", "layer", "lite"]
RoutingScheme = Literal["modulo", "balanced"]

_INF = float("inf")
_MAX_LAYERS = 10_000  # far above any network; a config of anybody may claim 10^12

# Defaults of unset coefficients. A force adds entire sub-layer outputs to the velocity, so it
# starts near the plain residual: full steps, an open gate, little memory.
_COEFFICIENTS = {
    #            alpha  beta  gate  dt
    "default": (0.9, 0.1, 0.5, 0.1),
    "force": (0.5, 0.01, 0.99, 1.0),
}


@strict
class DeepConfig(PreTrainedConfig):
    """Configuration of a complexity causal language model.

    The dynamics fields are those of `inl_core.INLDynamics`. A coefficient left at `None` gets the
    default of its placement when the config is created, and the saved file contains the number.

    Args:
        vocab_size: Number of token ids (rows of the embedding table).
        hidden_size: Width D of the residual stream.
        intermediate_size: Inner width of the SwiGLU MLP. With experts, the width that acts on one
            token: that of its expert plus that of the shared expert.
        num_hidden_layers: Number of decoder layers, at most 10,000.
        num_attention_heads: Query heads per layer; divides `hidden_size`.
        num_key_value_heads: Key and value heads per layer (grouped-query attention); divides
            `num_attention_heads`. `None` means one per query head.
        head_dim: Width of one head; even, because rotary embeddings turn pairs of channels.
            `None` means `hidden_size / num_attention_heads`.
        max_position_embeddings: Longest sequence in tokens that the model is made for.
        rms_norm_eps: Added to the mean square inside every RMSNorm.
        initializer_range: Standard deviation of the initial weights.
        rope_parameters: Rotary settings in transformers' form. `None` means `rope_type` "default"
            with `rope_theta` 10000.
        sliding_window: Number of tokens that a "sliding_attention" layer attends to, including the
            current one; `None` means that no layer slides.
        layer_types: "full_attention" or "sliding_attention" per layer. `None` means that all layers
            slide if `sliding_window` is set, and none otherwise.
        use_bidirectional_attention: Whether a token also attends to those after it: for an encoder
            of whole texts, which cannot generate.
        tie_word_embeddings: Whether the output head shares the embedding table.
        use_cache: Whether generation keeps keys and values.
        pad_token_id: Padding id, or `None`.
        bos_token_id: Id that starts a sequence, or `None`.
        eos_token_id: Id or ids that end a sequence, or `None`.
        num_experts: Routed experts of the MLP; 0 means a dense MLP.
        expert_intermediate_size: Width of one routed expert; with the shared width it adds up to
            `intermediate_size`. `None` means the rest that the shared expert leaves, or half if
            that is `None` too. Stays `None` without experts.
        shared_intermediate_size: Width of the shared expert that acts on every token; 0 for none.
            `None` means the rest that the routed expert leaves.
        routing_scheme: How token ids are assigned to experts: id modulo `num_experts` ("modulo"),
            or by the counts of a corpus ("balanced", set by the model's `balance_experts`).
        dynamics_placement: Where the dynamics act in a layer: on the residual stream ("stream"), on
            the attention branch ("branch"), driven by the outputs of both sub-layers ("force") or
            of the MLP alone ("force_mlp"), or nowhere ("none", the plain residual). The paper uses
            "stream" and "branch".
        dynamics_adaptive: What determines the coefficients: a controller per token ("token", as in
            the paper), learned vectors ("channel"), learned scalars ("layer"), or fixed numbers
            ("lite").
        dynamics_alpha: Initial inertia α, inside (0, 1); with "lite" the fixed α in [0, 1].
            `None` means 0.9, with a force 0.5.
        dynamics_beta: Initial correction β, in (0, `dynamics_beta_max`]; with "lite" 0 is allowed.
            `None` means 0.1, with a force 0.01.
        dynamics_gate: Initial gate g, inside (0, 1); with "lite" the fixed g in [0, 1].
            `None` means 0.5, with a force 0.99.
        dynamics_dt: Step size dt, positive. `None` means 0.1, with a force 1.
        dynamics_controller_hidden: Hidden width of the "token" controller.
        dynamics_beta_max: Upper bound of β; `None` for no bound.
        dynamics_velocity_max: Bound of |v|; `None` for no bound.
        dynamics_mu_min: Lower bound of the equilibrium μ; `None` for no bound.
        dynamics_mu_max: Upper bound of the equilibrium μ; `None` for no bound.
        dynamics_velocity_norm: With a force only: whether the velocity is divided by its root mean
            square before an update.
        num_loops: How often the layers `loop_start` to `loop_end` - 1 are applied, with the same
            weights, where a call gives no other number. 1 is the plain stack.
        loop_start: First layer of the loop. `None` means that the model has no loop if `num_loops`
            is 1, else the second layer (with less than three layers the first).
        loop_end: The layer after the last one of the loop, likewise; `None` leaves the last layer
            outside (with less than three layers none).
        loop_dynamics: Whether the loop carries a velocity from one repetition to the next
            (`inl_core.LoopedDynamics`), with the input of the loop as its equilibrium.
        loop_alpha: Initial inertia of that velocity, in [0, 1]; 0 starts as the plain loop.
        loop_spring: Whether a learned spring pulls the loop towards its input as well. It costs
            accuracy beyond the repetitions of the training (docs/results/tables/loops.md).
        loop_tolerance: Outside of training a token stops where its velocity, and the change of it,
            is at most this share of its position, and the loop ends when all have stopped;
            `None` computes all repetitions. Needs `loop_dynamics`.

    Raises:
        StrictDataclassFieldValidationError: A value has the wrong type or is not one of the allowed
            values. (Both strict errors are in `huggingface_hub.errors`.)
        StrictDataclassClassValidationError: A value is out of range or sizes do not fit together;
            the message names the value and what was expected.
        ValueError: A key starts with `dynamics_` or `loop_` but is not one of the above.

    Examples:
        >>> config = DeepConfig(hidden_size=384, num_attention_heads=6, dynamics_placement="force")
        >>> config.dynamics_dt, config.head_dim
        (1.0, 64)
    """

    model_type = "complexity-deep"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 — transformers reads this name

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_parameters: RopeParameters | dict | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    num_experts: int = 0
    expert_intermediate_size: int | None = None
    shared_intermediate_size: int | None = None
    routing_scheme: RoutingScheme = "modulo"
    dynamics_placement: Placement = "force_mlp"
    dynamics_adaptive: Adaptive = "channel"
    dynamics_alpha: float | int | None = None
    dynamics_beta: float | int | None = None
    dynamics_gate: float | int | None = None
    dynamics_dt: float | int | None = None
    dynamics_controller_hidden: int = 64
    dynamics_beta_max: float | int | None = 2.0
    dynamics_velocity_max: float | int | None = 10.0
    dynamics_mu_min: float | int | None = 0.0
    dynamics_mu_max: float | int | None = 2.0
    dynamics_velocity_norm: bool = False
    num_loops: int = 1
    loop_start: int | None = None
    loop_end: int | None = None
    loop_dynamics: bool = True
    loop_alpha: float | int = 0.5
    loop_spring: bool = False
    loop_tolerance: float | None = None
    use_bidirectional_attention: bool = False

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DeepConfig":
        """Create the configuration of a named size, "15m" to "7b" (`complexity_lm.PRESETS`).

        `overrides` are fields of the configuration; they take precedence over the preset.

        Raises:
            ValueError: No preset has that name; the message lists the presets.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, choose from: {', '.join(PRESETS)}")
        sizes = PRESETS[name]._asdict()
        del sizes["millions"]
        return cls(**(sizes | overrides))

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # pyright: ignore -- an attribute elsewhere
        """How transformers shares the matrices among processes (`DistributedConfig(tp_size=N)`).

        Attention by heads and the MLP by inner channels, those of every expert included. What acts
        on the whole width stays as it is in each process: norms, dynamics, loops.
        """
        split = {f"self_attn.{name}_proj": "colwise" for name in "qkv"}
        # Each process normalises its own heads and has the gradient of those alone.
        split |= {f"self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        split["self_attn.o_proj"] = "rowwise"
        if self.num_experts == 0:
            names = ["gate_proj", "up_proj", "down_proj"]
        else:
            names = ["gate", "up", "down"]
            if self.shared_intermediate_size:
                names += [f"shared_{name}" for name in names]
            split["mlp"] = "moe_tp_experts"  # adds the parts of the output
        split |= {f"mlp.{name}": "rowwise" if "down" in name else "colwise" for name in names}
        return {f"layers.*.{name}": how for name, how in split.items()}

    @property
    def attention_is_named(self) -> bool | None:
        """Whether the user of a model named its `attn_implementation`; None before there is one.

        Not saved, like the implementation itself.
        """
        return self.__dict__.get("_attention_is_named")

    @attention_is_named.setter
    def attention_is_named(self, value: bool | None) -> None:
        self.__dict__["_attention_is_named"] = value

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        d.pop("_attention_is_named", None)
        super()._remove_keys_not_serialized(d)

    def __post_init__(self, **kwargs: Any) -> None:
        """Replace `None` by defaults and reject misspelt keys of dynamics and loop.

        `kwargs` are keys that are not fields of this class; transformers keeps those it knows.
        """
        for name in kwargs:
            prefix = name[: name.find("_") + 1]
            if prefix in ("dynamics_", "loop_"):
                fields = type(self).__dataclass_fields__
                known = ", ".join(field for field in fields if field.startswith(prefix))
                raise ValueError(f"unknown config key {name!r}; the keys are: {known}")

        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * min(self.num_hidden_layers, _MAX_LAYERS)
        if self.num_loops > 1 or (self.loop_start, self.loop_end) != (None, None):
            layers = self.num_hidden_layers
            if self.loop_start is None:
                self.loop_start = 1 if layers > 2 else 0
            if self.loop_end is None:
                self.loop_end = layers - 1 if layers > 2 else layers
        if self.num_experts > 0:
            width, expert = self.intermediate_size, self.expert_intermediate_size
            if self.shared_intermediate_size is None:
                self.shared_intermediate_size = width - (width // 2 if expert is None else expert)
            if expert is None:
                self.expert_intermediate_size = width - self.shared_intermediate_size

        placement = "force" if self.dynamics_placement.startswith("force") else "default"
        names = ("dynamics_alpha", "dynamics_beta", "dynamics_gate", "dynamics_dt")
        for name, default in zip(names, _COEFFICIENTS[placement], strict=True):
            value = getattr(self, name)
            setattr(self, name, default if value is None else float(value))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check the sizes; called by `@strict` after construction and before saving."""
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "dynamics_controller_hidden",
        ):  # fmt: skip
            self._check(name, "at least 1", lambda x: x >= 1)
        self._check("num_hidden_layers", f"at most {_MAX_LAYERS}", lambda x: x <= _MAX_LAYERS)
        for name in ("rms_norm_eps", "initializer_range"):
            self._check(name, "positive and finite", lambda x: 0 < x < _INF)
        self._check("sliding_window", "at least 1 or None", lambda x: x >= 1)

        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be divisible by num_attention_heads {heads}"
            )
        if heads % (kv_heads or 1):
            raise ValueError(
                f"num_attention_heads {heads} must be divisible by num_key_value_heads {kv_heads}"
            )
        self._check(
            "head_dim",
            "an even number of at least 2 for rotary embeddings (change it, hidden_size or "
            "num_attention_heads)",
            lambda x: x >= 2 and x % 2 == 0,
        )
        layer_types = self.layer_types or []
        for kind in layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(
                    f"layer_types must be 'full_attention' or 'sliding_attention', got {kind!r}"
                )
        if self.sliding_window is None and "sliding_attention" in layer_types:
            raise ValueError("layer_types has 'sliding_attention' but sliding_window is None")
        self._check("num_experts", "0 (dense MLP) or more", lambda x: x >= 0)
        if self.num_experts == 0:
            for name in ("expert_intermediate_size", "shared_intermediate_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} {getattr(self, name)} needs num_experts above 0")
            return
        if self.num_experts > self.vocab_size:
            raise ValueError(
                f"num_experts {self.num_experts} must not exceed vocab_size {self.vocab_size}: "
                "experts are chosen by token id"
            )
        rule = "(both add up to intermediate_size)"
        self._check("expert_intermediate_size", f"at least 1 {rule}", lambda x: x >= 1)
        self._check("shared_intermediate_size", f"at least 0 {rule}", lambda x: x >= 0)
        expert, shared = self.expert_intermediate_size, self.shared_intermediate_size
        if (expert or 0) + (shared or 0) != self.intermediate_size:
            raise ValueError(
                f"expert_intermediate_size {expert} plus shared_intermediate_size {shared} must "
                f"equal intermediate_size {self.intermediate_size}, the width that acts on one "
                "token"
            )

    def validate_dynamics(self) -> None:
        """Check the dynamics settings against the bounds of the mathematics."""
        self._check("dynamics_dt", "positive and finite", lambda x: 0 < x < _INF)
        for name in ("dynamics_beta_max", "dynamics_velocity_max"):
            self._check(name, "positive and finite, or None", lambda x: 0 < x < _INF)

        # Learned coefficients start at the logit or inverse softplus of the number, which is
        # infinite at the ends of the range; fixed ones ("lite") may lie on the ends.
        fixed, top = self.dynamics_adaptive == "lite", self.dynamics_beta_max
        for name in ("dynamics_alpha", "dynamics_gate"):
            expected = "in [0, 1]" if fixed else "inside (0, 1), ends excluded"
            self._check(name, expected, lambda x: 0 <= x <= 1 if fixed else 0 < x < 1)
        self._check(
            "dynamics_beta",
            f"in {'[' if fixed else '('}0, dynamics_beta_max = {top}]",
            lambda x: (0 <= x < _INF if fixed else 0 < x < _INF) and (top is None or x <= top),
        )

        low, high = self.dynamics_mu_min, self.dynamics_mu_max
        for name in ("dynamics_mu_min", "dynamics_mu_max"):
            self._check(name, "finite or None", lambda x: -_INF < x < _INF)
        if low is not None and high is not None and low > high:
            raise ValueError(f"dynamics_mu_min {low} must not exceed dynamics_mu_max {high}")

    def validate_loop(self) -> None:
        """Check the range of the loop and its numbers."""
        self._check("num_loops", "at least 1", lambda x: x >= 1)
        self._check("loop_alpha", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check("loop_tolerance", "positive, or None", lambda x: 0 < x < _INF)
        start, end = self.loop_start, self.loop_end
        if start is not None and not 0 <= start < (end or 0) <= self.num_hidden_layers:
            raise ValueError(
                f"loop_start {start} and loop_end {end} must satisfy 0 <= loop_start < loop_end <= "
                f"num_hidden_layers {self.num_hidden_layers}: the loop repeats the layers "
                "loop_start to loop_end - 1"
            )
        if self.loop_tolerance is not None and not (self.loop_dynamics and start is not None):
            raise ValueError(
                f"loop_tolerance {self.loop_tolerance} needs a loop with loop_dynamics: the "
                "velocity says when to stop"
            )
        self.unrolled()

    def unrolled(self, num_loops: int | None = None) -> "DeepConfig":
        """The configuration of the stack without a loop that has as many layers as are computed.

        A cache has one entry per computed layer, so that it is made from this one.

        Args:
            num_loops: Repetitions; `None` means those of the configuration.

        Returns:
            A copy; without a loop, this configuration itself.

        Raises:
            ValueError: `num_loops` is below 1 or unreasonably large, or is not 1 without a loop.
        """
        start, end = self.loop_start, self.loop_end
        count = self.num_loops if num_loops is None else num_loops
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"num_loops must be a whole number of at least 1, got {count!r}")
        if start is None or end is None or self.layer_types is None:
            if count != 1:
                raise ValueError(
                    f"num_loops {count}: this model has no loop; make it with num_loops above 1 "
                    "(or loop_start and loop_end) in its configuration"
                )
            return self
        depth = self.num_hidden_layers + (count - 1) * (end - start)
        if depth > _MAX_LAYERS:
            raise ValueError(f"num_loops {count} makes {depth} layers, more than {_MAX_LAYERS}")
        types = self.layer_types
        result = copy.copy(self)
        result.layer_types = types[:start] + types[start:end] * count + types[end:]
        result.num_hidden_layers = depth
        result.num_loops, result.loop_start, result.loop_end = 1, None, None
        return result

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> "DeepConfig":
        """As in transformers, whose caches ask it for the decoder: that is the unrolled stack."""
        return self.unrolled() if decoder else self

    def _check(self, name: str, expected: str, accepts: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if value is None and not expected.endswith("or None"):
            expected = "a number in a complete config"
        elif value is None or accepts(value):
            return
        raise ValueError(f"{name} must be {expected}, got {value}")


__all__ = ["PRESETS", "DeepConfig", "Preset"]


# `transformers serve` looks the name in `architectures` up among the names of transformers. It has
# read this file by then, the copy in a model folder included, but not yet the file of the model.
# Transformers imports itself a second time for processors, and the server has the first copy: the
# class of both has the names.
for _name, _auto in {
    "DeepModel": AutoModel,
    "DeepForCausalLM": AutoModelForCausalLM,
    "DeepForSequenceClassification": AutoModelForSequenceClassification,
    "DeepForTokenClassification": AutoModelForTokenClassification,
    "DeepForQuestionAnswering": AutoModelForQuestionAnswering,
}.items():
    if not hasattr(transformers, _name):
        setattr(type(transformers), _name, _auto)
