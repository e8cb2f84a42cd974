"""FSDP2 from the settings of the launcher and the committed accelerate config."""

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.training.train import sharding_plugin
from inl_core.run.errors import UserError

CONFIG = "configs/accelerate/fsdp2.yaml"


def test_sharding_is_on_if_the_launcher_asks_for_it(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert sharding_plugin() is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"fsdp_version is 1; set fsdp_version: 2"):
        sharding_plugin()


def test_timesteps_are_not_rounded_by_sharding(monkeypatch):
    settings = load_config_from_file(CONFIG).fsdp_config
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in settings.items():  # as `accelerate launch` hands them on
        monkeypatch.setenv(
            name.upper(), str(value).lower() if value in (True, False) else str(value)
        )
    plugin = sharding_plugin()
    plugin.set_mixed_precision("bf16")  # as accelerate does with the run's own
    policy = plugin.mixed_precision_policy
    assert (plugin.fsdp_version, policy.cast_forward_inputs, policy.param_dtype) == (2, False, None)
    assert float(torch.tensor(999.0).bfloat16()) != 999.0  # what a cast would do
    plugin.set_auto_wrap_policy(ComplexityDiTTransformer2DModel(num_layers=1))
    assert settings["fsdp_transformer_layer_cls_to_wrap"] == "ComplexityDiTBlock"
