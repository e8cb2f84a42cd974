"""TinyAutoencoder against diffusers, its formula and the weights of TAEF2; loading VAEs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, AutoModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from complexity_dit.hashing import weights_sha256
from complexity_dit.models.autoencoder import TinyAutoencoder, TinyBlock
from complexity_dit.models.vae import load_vae, posterior, scale_factor
from inl_core.run.errors import UserError

SMALL = {
    "latent_channels": 6, "block_out_channels": (8, 8, 12), "layers_per_block": (1, 2, 1),
    "decoder_layers_per_block": (2, 1, 1), "pool_channels": 16,
}  # fmt: skip


@pytest.fixture
def small() -> TinyAutoencoder:
    torch.manual_seed(0)
    return TinyAutoencoder(**SMALL).eval()


@pytest.fixture
def taef2() -> Path:
    data = os.environ.get("COMPLEXITY_DATA")
    if not data:
        pytest.skip("COMPLEXITY_DATA names no folder with taef2/ and wikiart/")
    return Path(data) / "taef2"


def release(model: TinyAutoencoder, folder: Path) -> Path:
    """Write a model as the two files of a TAESD release."""
    folder.mkdir()
    for part in ("encoder", "decoder"):
        save_file(getattr(model, part).state_dict(), folder / f"tae_{part}.safetensors")
    return folder


@pytest.mark.parametrize("count", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_taef2_reconstructs_paintings(count, taef2):
    vae = load_vae(str(taef2))
    assert vae.config.latent_channels == 32
    assert scale_factor(vae) == 8
    files = sorted((taef2.parent / "wikiart" / "images").glob("*.jpg"))[:count]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    psnr = []
    for batch in images.split(8):
        again = vae(batch).sample.clamp(-1, 1)
        error = ((again - batch) / 2).square().flatten(1).mean(1)
        psnr += (-10 * error.log10()).tolist()
    assert np.mean(psnr) > 28.0  # 26.5 dB with 8 groups in its norm instead of 4


def test_taef2_saved_as_a_diffusers_model_has_the_same_weights(taef2, tmp_path):
    vae = load_vae(str(taef2))
    vae.save_pretrained(tmp_path / "saved")
    again = load_vae(str(tmp_path / "saved"))
    assert isinstance(again, TinyAutoencoder)
    assert weights_sha256(again) == weights_sha256(vae)


def test_without_pooling_branch_it_equals_autoencoder_tiny():
    torch.manual_seed(0)
    reference = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 2, 1), num_decoder_blocks=(2, 1, 1), latent_channels=6,
    ).eval()  # fmt: skip
    model = TinyAutoencoder(**SMALL | {"block_out_channels": (8, 8, 8), "pool_channels": 0}).eval()
    state = {}
    for name, value in reference.state_dict().items():
        part, _, layer, rest = name.split(".", 3)
        # In diffusers the clamp of the decoder is not one of its layers.
        state[f"{part}.{int(layer) + (part == 'decoder')}.{rest}"] = value
    model.load_state_dict(state)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = model.encode(images).latents
    assert latents.shape == (2, 6, 4, 6)
    torch.testing.assert_close(latents, reference.encode(images).latents)
    torch.testing.assert_close(model.decode(latents).sample, reference.decode(latents).sample)
    assert torch.equal(model(images).sample, model.decode(latents, return_dict=False)[0])


def test_block_with_pooling_branch_equals_its_formula():
    torch.manual_seed(0)
    block = TinyBlock(8, pool_channels=16, pool_groups=4).double()
    first, norm, _, last = block.pool
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    wide = torch.einsum("oi,biyx->boyx", first.weight[..., 0, 0], x)
    groups = wide.reshape(2, 4, -1)
    spread = groups.var(-1, correction=0, keepdim=True) + norm.eps
    normed = ((groups - groups.mean(-1, keepdim=True)) / spread.sqrt()).reshape(wide.shape)
    normed = (normed * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)).clamp(min=0)
    y = x + torch.einsum("oi,biyx->boyx", last.weight[..., 0, 0], normed)
    torch.testing.assert_close(block(x), (y + block.conv(y)).clamp(min=0))


@pytest.mark.parametrize("pool_channels", [0, 16])
def test_the_config_of_a_release_is_derived_from_its_tensors(pool_channels, tmp_path):
    model = TinyAutoencoder(**SMALL | {"pool_channels": pool_channels})
    again = TinyAutoencoder.from_taesd(release(model, tmp_path / "release"))
    for key, value in (SMALL | {"pool_channels": pool_channels}).items():
        assert again.config[key] == (list(value) if isinstance(value, tuple) else value)
    assert weights_sha256(again) == weights_sha256(model)
    assert weights_sha256(load_vae(str(tmp_path / "release"))) == weights_sha256(model)


def test_the_hash_depends_on_every_weight(small):
    before = weights_sha256(small)
    with torch.no_grad():
        small.decoder[-1].bias[0] += 1e-3
    assert weights_sha256(small) != before


def test_tiny_autoencoders_have_no_posterior(small):
    mean, std = posterior(small, torch.zeros(1, 3, 8, 8))
    assert mean.shape == (1, 6, 2, 2)
    assert std is None


def test_an_unknown_pickle_is_not_opened(small, tmp_path):
    folder = release(small, tmp_path / "release")
    (folder / "tae_decoder.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    torch.save({"0.weight": Bomb()}, folder / "tae_decoder.pth")
    with pytest.raises(UserError, match=r"is a pickle with sha256 .*not opened"):
        load_vae(str(folder))
    assert not (tmp_path / "opened").exists()


def test_broken_releases_are_refused(small, tmp_path):
    folder = release(small, tmp_path / "release")
    decoder = folder / "tae_decoder.safetensors"
    save_file({"0.weight": torch.zeros(1)}, decoder)
    with pytest.raises(UserError, match="not an autoencoder of the TAESD family"):
        load_vae(str(folder))
    decoder.write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot read"):
        load_vae(str(folder))
    decoder.unlink()
    with pytest.raises(UserError, match=r"0 files named \*decoder"):
        load_vae(str(folder))


def test_the_vae_of_a_pipeline_folder_loads(small, tmp_path):
    small.save_pretrained(tmp_path / "vae")
    assert weights_sha256(load_vae(str(tmp_path))) == weights_sha256(small)


def test_a_stock_tiny_autoencoder_loads_by_its_class(tmp_path):
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path)
    again = load_vae(str(tmp_path))
    assert isinstance(again, AutoencoderTiny)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    mean, std = posterior(again, images)
    assert std is None
    assert mean.shape[-1] * scale_factor(again) == 8
    torch.testing.assert_close(mean, vae.encode(images).latents)


def test_folders_without_a_vae_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no VAE folder"):
        load_vae(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no VAE in"):
        load_vae(str(tmp_path))
    with pytest.raises(UserError, match=r"no VAE in someone/vae"):  # offline, and not cached
        load_vae("someone/vae")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match=r"is a UNet2DModel; latents can come from AutoencoderKL"):
        load_vae(str(tmp_path))


def test_depths_of_unequal_length_are_refused():
    with pytest.raises(UserError, match="must be of one length"):
        TinyAutoencoder(block_out_channels=(8, 8), layers_per_block=(1,))


def test_slices_equal_the_batch(small):
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    whole = small.encode(images).latents
    small.enable_slicing()
    torch.testing.assert_close(small.encode(images).latents, whole)
    torch.testing.assert_close(small.decode(whole).sample, small(images).sample)


@pytest.mark.parametrize("size", [(96, 120), (44, 132), (64, 64)])
def test_tiles_equal_the_whole_away_from_their_borders(size):
    torch.manual_seed(0)
    settings = SMALL | {"pool_channels": 0, "block_out_channels": (8, 8, 8)}
    settings |= {"layers_per_block": (0, 1, 0), "decoder_layers_per_block": (0, 1, 0)}
    vae = TinyAutoencoder(**settings).eval()
    images = torch.rand(2, 3, *size) * 2 - 1
    latents = vae.encode(images).latents
    sample = vae.decode(latents).sample
    vae.enable_tiling()
    vae.tile_sample_min_size = 64
    tiled = vae.encode(images).latents
    assert tiled.shape == latents.shape
    # Zeros at the border of a tile reach a few cells into it, and are blended there.
    assert (tiled - latents).abs().median() < 1e-5
    assert (tiled - latents).abs().max() < (latents - latents.mean()).abs().max()
    again = vae.decode(latents).sample
    assert again.shape == sample.shape
    assert (again - sample).abs().median() < 1e-5
    vae.disable_tiling()
    assert torch.equal(vae.encode(images).latents, latents)


def test_auto_model_of_diffusers_loads_the_folder(small, tmp_path):
    small.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(again) is TinyAutoencoder
    assert weights_sha256(again) == weights_sha256(small)


def test_patches_are_cells_of_the_first_stage():
    torch.manual_seed(0)
    vae = TinyAutoencoder(**SMALL | {"patch_size": 2}).eval()
    assert scale_factor(vae) == 8
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    latents = vae.encode(images).latents
    assert latents.shape == (1, 6, 2, 3)
    assert vae.decode(latents).sample.shape == images.shape
    with pytest.raises(UserError, match="patch_size 0"):
        TinyAutoencoder(**SMALL | {"patch_size": 0})
