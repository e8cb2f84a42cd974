"""`DeepConfig`: defaults, saving and loading, registration, and errors of invalid input."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)
from transformers import AutoConfig

from complexity_lm import DeepConfig
from complexity_lm.config import ModelConfig


def test_defaults() -> None:
    config = DeepConfig()
    assert config.model_type == "complexity-deep"
    assert (config.dynamics_placement, config.dynamics_adaptive) == ("force_mlp", "channel")
    run = ModelConfig()
    assert (run.dynamics_placement, run.dynamics_adaptive) == ("force_mlp", "channel")
    assert coefficients(config) == (0.5, 0.01, 0.99, 1.0)
    assert (config.dynamics_beta_max, config.dynamics_velocity_max) == (2.0, 10.0)
    assert (config.dynamics_mu_min, config.dynamics_mu_max) == (0.0, 2.0)
    assert config.num_experts == 0
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.head_dim == config.hidden_size // config.num_attention_heads
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def coefficients(config: DeepConfig) -> tuple:
    return tuple(getattr(config, f"dynamics_{name}") for name in ("alpha", "beta", "gate", "dt"))


def test_placements_of_the_paper_have_its_coefficients() -> None:
    for placement in ("stream", "branch"):
        config = DeepConfig(dynamics_placement=placement, dynamics_adaptive="token")
        assert coefficients(config) == (0.9, 0.1, 0.5, 0.1)


def test_a_saved_config_contains_its_dynamics(tmp_path: Path) -> None:
    """The default has changed since 0.1.0: no saved file may depend on it."""
    DeepConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    fields = {name for name in DeepConfig.__dataclass_fields__ if name.startswith("dynamics_")}
    assert fields <= saved.keys()
    run = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "lm-run"
    for folder in (run / "model", run / "checkpoints" / "step-00000002"):
        old = DeepConfig.from_pretrained(folder)
        assert (old.dynamics_placement, old.dynamics_adaptive) == ("branch", "token")


def test_force_has_its_own_defaults_and_explicit_values_take_precedence() -> None:
    assert coefficients(DeepConfig(dynamics_placement="force")) == (0.5, 0.01, 0.99, 1.0)
    explicit = DeepConfig(dynamics_placement="force", dynamics_alpha=0.7, dynamics_dt=1)
    assert (explicit.dynamics_alpha, explicit.dynamics_dt) == (0.7, 1.0)
    assert isinstance(explicit.dynamics_dt, float)


def test_expert_widths_add_up_to_the_active_width() -> None:
    def widths(**settings) -> tuple[int | None, int | None]:
        config = DeepConfig(intermediate_size=100, **settings)
        return config.expert_intermediate_size, config.shared_intermediate_size

    assert widths() == (None, None)
    assert widths(num_experts=2) == (50, 50)
    assert widths(num_experts=2, expert_intermediate_size=30) == (30, 70)
    assert widths(num_experts=2, shared_intermediate_size=30) == (70, 30)
    assert widths(num_experts=2, shared_intermediate_size=0) == (100, 0)


def test_a_window_makes_every_layer_slide_by_default() -> None:
    assert set(DeepConfig().layer_types or []) == {"full_attention"}
    assert set(DeepConfig(sliding_window=8).layer_types or []) == {"sliding_attention"}


FIXED = {
    "dynamics_placement": "force", "dynamics_adaptive": "lite", "dynamics_alpha": 0,
    "dynamics_beta": 0, "dynamics_gate": 1, "dynamics_beta_max": None,
    "dynamics_velocity_max": None, "dynamics_mu_min": None, "dynamics_mu_max": None,
}  # fmt: skip
SETTINGS = [
    {},
    {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_experts": 4},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
    FIXED,
    {"dynamics_placement": "none", "eos_token_id": [1, 2], "tie_word_embeddings": False},
    {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
    {"num_experts": 3, "expert_intermediate_size": 512, "routing_scheme": "balanced"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_save_and_load_round_trip(settings: dict, tmp_path: Path) -> None:
    config = DeepConfig(**settings)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name, value in settings.items():
        assert saved[name] == value, name

    for loaded in (DeepConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is DeepConfig
        for name in DeepConfig.__dataclass_fields__:
            if name != "transformers_version":
                assert getattr(loaded, name) == getattr(config, name), name


def test_registered_with_auto_config() -> None:
    config = AutoConfig.for_model("complexity-deep", dynamics_placement="stream")
    assert isinstance(config, DeepConfig)
    assert config.dynamics_placement == "stream"


OUT_OF_RANGE = [
    ({"hidden_size": 100, "num_attention_heads": 3}, r"hidden_size 100 .* num_attention_heads 3"),
    ({"num_attention_heads": 12, "num_key_value_heads": 5}, r"heads 12 .*num_key_value_heads 5"),
    ({"hidden_size": 12, "num_attention_heads": 4}, r"head_dim .* even .* got 3"),
    ({"hidden_size": 0}, r"hidden_size must be at least 1, got 0"),
    ({"num_attention_heads": 0}, r"num_attention_heads must be at least 1, got 0"),
    ({"num_key_value_heads": 0}, r"num_key_value_heads must be at least 1, got 0"),
    ({"num_hidden_layers": -2}, r"num_hidden_layers must be at least 1, got -2"),
    ({"vocab_size": 0}, r"vocab_size must be at least 1, got 0"),
    ({"rms_norm_eps": 0.0}, r"rms_norm_eps must be positive and finite, got 0\.0"),
    ({"num_experts": -1}, r"num_experts must be 0 .* got -1"),
    ({"num_experts": 40000}, r"num_experts 40000 must not exceed vocab_size 32000"),
    ({"expert_intermediate_size": 64}, r"expert_intermediate_size 64 needs num_experts above 0"),
    (
        {"num_experts": 2, "expert_intermediate_size": 9, "shared_intermediate_size": 9},
        r"size 9 plus shared_intermediate_size 9 must equal intermediate_size 2048",
    ),
    ({"sliding_window": 0}, r"sliding_window must be at least 1 or None, got 0"),
    (
        {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
        r"layer_types has 'sliding_attention' but sliding_window is None",
    ),
    (
        {"num_hidden_layers": 1, "layer_types": ["linear_attention"]},
        r"layer_types must be .* got 'linear_attention'",
    ),
    ({"dynamics_alpha": 1.0}, r"dynamics_alpha must be inside \(0, 1\).* got 1\.0"),
    ({"dynamics_alpha": float("nan")}, r"dynamics_alpha .* got nan"),
    ({"dynamics_gate": 0}, r"dynamics_gate must be inside \(0, 1\).* got 0\.0"),
    ({"dynamics_beta": 0}, r"dynamics_beta must be in \(0, dynamics_beta_max = 2\.0\], got 0\.0"),
    ({"dynamics_beta": 3.0}, r"dynamics_beta must be .* got 3\.0"),
    ({"dynamics_beta": float("inf"), "dynamics_beta_max": None}, r"dynamics_beta must .* got inf"),
    ({"dynamics_adaptive": "lite", "dynamics_alpha": 1.5}, r"in \[0, 1\], got 1\.5"),
    ({"dynamics_dt": 0.0}, r"dynamics_dt must be positive and finite, got 0\.0"),
    ({"dynamics_beta_max": float("inf")}, r"dynamics_beta_max must be positive .* got inf"),
    ({"dynamics_velocity_max": -1.0}, r"dynamics_velocity_max must be positive .* got -1\.0"),
    ({"dynamics_mu_min": 3.0}, r"dynamics_mu_min 3\.0 must not exceed dynamics_mu_max 2\.0"),
    ({"dynamics_mu_max": float("nan")}, r"dynamics_mu_max must be finite or None, got nan"),
    ({"dynamics_controller_hidden": 0}, r"dynamics_controller_hidden must be at least 1, got 0"),
]


@pytest.mark.parametrize(("settings", "message"), OUT_OF_RANGE)
def test_values_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        DeepConfig(**settings)


WRONG_TYPE = [
    ({"hidden_size": "768"}, r"'hidden_size' expected int, got str"),
    ({"num_hidden_layers": True}, r"'num_hidden_layers' expected int, got bool"),
    (
        {"dynamics_placement": "residual"},
        r"expected one of \('stream', 'branch', 'force', 'force_mlp', 'none'\)",
    ),
    ({"dynamics_adaptive": "head"}, r"expected one of \('token', 'channel', 'layer', 'lite'\)"),
    ({"dynamics_alpha": "0.9"}, r"dynamics_alpha"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_TYPE)
def test_values_of_the_wrong_type(settings: dict, message: str) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=message):
        DeepConfig(**settings)


def test_a_misspelt_dynamics_key_gives_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'dynamics_placment'.*dynamics_placement"):
        DeepConfig(dynamics_placment="none")


@pytest.mark.parametrize(("name", "value"), [("dynamics_beta", 5.0), ("head_dim", None)])
def test_an_invalid_config_is_not_saved(name: str, value: float | None, tmp_path: Path) -> None:
    config = DeepConfig()
    setattr(config, name, value)
    with pytest.raises(StrictDataclassClassValidationError, match=f"{name} .* got {value}"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
