"""Weights and config of a folder: every kind of network is loaded completely or not at all."""

import json
from functools import partial

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from safetensors.torch import load_file, save_file

from complexity_dit.evaluation.networks import load_extractor
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.models.loading import load_weights
from complexity_dit.models.vae import load_vae
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline
from inl_core.run.errors import UserError
from support.hub import put_in_hub_cache
from support.networks import small_network, small_vae

VAES = {
    "kl": small_vae,
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ),
    "pooled": lambda: TinyAutoencoder(
        block_out_channels=[8, 8], layers_per_block=[1, 1], decoder_layers_per_block=[1, 1]
    ),
}  # fmt: skip


def test_networks_of_earlier_versions_load_unless_they_used_what_was_removed(tmp_path):
    network = small_network()
    network.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    change_config(path, routing="none", num_experts=4, routing_edges=None, value_residual=False)
    again = type(network).from_pretrained(tmp_path)
    assert not {"routing", "routing_edges", "value_residual"} & again.config.keys()
    change_config(path, value_residual=True)
    with pytest.raises(ValueError, match="value_residual is True: that was removed"):
        type(network).from_pretrained(tmp_path)


def lose_a_tensor(path):
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != lost}, path, {"format": "pt"})
    return lost


def change_config(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", VAES)
def test_a_vae_with_a_missing_tensor_or_a_giant_config_is_refused(tmp_path, name):
    VAES[name]().save_pretrained(tmp_path)
    load_vae(str(tmp_path))
    change_config(tmp_path / "config.json", latent_channels=10**8)
    with pytest.raises(UserError, match=r"cannot load the VAE .*config\.json describes a network"):
        load_vae(str(tmp_path))
    change_config(tmp_path / "config.json", latent_channels=VAES[name]().config.latent_channels)
    lost = lose_a_tensor(tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=f"{lost} is missing"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_vae_of_the_hub_is_looked_at_as_one_of_a_folder(tmp_path, monkeypatch, name, subfolder):
    VAES[name]().save_pretrained(tmp_path / "model" / subfolder)
    cache = tmp_path / "cache"
    snapshot = put_in_hub_cache(tmp_path / "model", "some/vae", cache, monkeypatch) / subfolder
    (snapshot / "notes.bin").write_text("not opened")
    load_vae("some/vae")
    change_config(snapshot / "config.json", latent_channels=10**8)
    with pytest.raises(UserError, match=r"cannot load the VAE some/vae: .*describes a network"):
        load_vae("some/vae")
    (snapshot / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="is a pickle, which can run code and is not opened"):
        load_vae("some/vae")


def test_a_pipeline_of_the_hub_is_looked_at_as_a_folder(pipe, tmp_path, monkeypatch):
    whole = ComplexityDiTPipeline(pipe.transformer, pipe.scheduler, small_vae())
    whole.save_pretrained(tmp_path / "model")
    snapshot = put_in_hub_cache(tmp_path / "model", "some/dit", tmp_path / "cache", monkeypatch)
    load_pipeline("some/dit")
    stock = partial(DiffusionPipeline.from_pretrained, "some/dit", trust_remote_code=True)
    stock()
    for part in ("vae", "transformer"):
        text = (snapshot / part / "config.json").read_text()
        change_config(
            snapshot / part / "config.json", block_out_channels=[10**6], hidden_size=10**9
        )
        with pytest.raises(UserError, match=f"some/dit: .*{part}.*config.json"):
            load_pipeline("some/dit")
        if part == "transformer":  # a VAE of diffusers is loaded by it alone
            with pytest.raises(UserError, match=r"transformer.*config.json describes a network"):
                stock()
        (snapshot / part / "config.json").write_text(text)


def test_a_vision_model_of_the_hub_is_looked_at_as_one_of_a_folder(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "model")
    cache = tmp_path / "cache"
    snapshot = put_in_hub_cache(tmp_path / "model", "some/dino", cache, monkeypatch)

    def load():
        return load_weights(
            transformers.AutoModel.from_pretrained,
            lambda values: transformers.Dinov2Model(transformers.Dinov2Config(**values)),
            "some/dino", cache_dir=cache,
        )  # fmt: skip

    assert load().config.hidden_size == 32
    change_config(snapshot / "config.json", hidden_size=10**6)
    with pytest.raises(UserError, match=r"config\.json describes a network"):
        load()


def test_a_repository_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    small_vae().save_pretrained(tmp_path / "model")
    put_in_hub_cache(tmp_path / "model", "some/vae", tmp_path / "cache", monkeypatch)
    with pytest.raises(
        UserError, match=r"^cannot load some/other, no folder here, from the Hub: .+"
    ):
        TinyAutoencoder.from_pretrained("some/other")


def test_a_pipeline_whose_vae_lacks_a_tensor_is_refused(pipe, tmp_path):
    ComplexityDiTPipeline(pipe.transformer, pipe.scheduler, small_vae()).save_pretrained(tmp_path)
    load_pipeline(str(tmp_path))
    lost = lose_a_tensor(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=f"vae lacks the tensor {lost}"):
        load_pipeline(str(tmp_path))


def test_a_vision_model_is_complete_or_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    processor = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "size": 28}
    # Saved with a head, which is not used.
    transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert load_extractor(str(tmp_path))(torch.zeros(1, 3, 28, 28).byte()).shape == (1, 32)
    change_config(tmp_path / "config.json", hidden_size=10**6)
    with pytest.raises(UserError, match=r"config\.json describes a network"):
        load_extractor(str(tmp_path))
    change_config(tmp_path / "config.json", hidden_size=32)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "layer.0.mlp" in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, path, {"format": "pt"})
    with pytest.raises(UserError, match="is missing"):
        load_extractor(str(tmp_path))
