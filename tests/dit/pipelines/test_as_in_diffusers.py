"""What users of other diffusers pipelines pass and expect, beyond the labels."""

import numpy as np
import pytest
import torch
from diffusers import AutoModel
from diffusers.utils import logging
from peft import LoraConfig

from complexity_dit import (
    ComplexityDiTImg2ImgPipeline,
    ComplexityDiTInpaintPipeline,
    ComplexityDiTTransformer2DModel,
    UserError,
)
from support.networks import randomised, small_network


def inputs():
    torch.manual_seed(2)
    return torch.randn(2, 3, 8, 8), torch.full((2,), 300.0)


def adapted(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return pipe


def paint(pipe, **call):
    return pipe(
        style=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
        output_type="np", **call,
    ).images  # fmt: skip


@torch.no_grad()
def test_the_network_takes_labels_as_a_list():
    model = randomised(small_network(label_fields=["style"], num_classes=[3]))
    expected = model(*inputs(), torch.tensor([1, 2])).sample
    for labels in ([1, 2], [[1], [2]], (1, 2)):
        assert torch.equal(model(*inputs(), labels).sample, expected)


def test_attention_kwargs_scale_the_adapter_for_one_call(pipe):
    plain = paint(pipe)
    adapted(pipe)
    full = paint(pipe)
    assert not np.array_equal(full, plain)
    np.testing.assert_allclose(paint(pipe, attention_kwargs={"scale": 0.0}), plain, atol=1e-6)
    half = paint(pipe, attention_kwargs={"scale": 0.5})
    assert not np.allclose(half, plain)
    assert not np.allclose(half, full)
    assert np.array_equal(paint(pipe, attention_kwargs={"scale": 1.0}), full)
    assert np.array_equal(paint(pipe), full)
    with pytest.raises(ValueError, match="has 'mask': only scale"):
        paint(pipe, attention_kwargs={"mask": None})
    assert np.array_equal(paint(pipe), full)


def test_errors_of_adapters_that_are_not_about_their_shape_keep_their_words(pipe, tmp_path):
    adapted(pipe)
    tensors = pipe.transformer.adapter_state_dict()
    with pytest.raises(ValueError, match="already in use"):
        pipe.transformer.load_lora_adapter(tensors, prefix=None, adapter_name="default")
    with pytest.raises(ValueError, match=r"Adapter name foo not found in the model\. It has: def"):
        pipe.transformer.save_lora_adapter(tmp_path, adapter_name="foo")
    pipe.transformer.unload_lora()
    wrong = {k: v[..., :5] if "lora_A" in k else v for k, v in tensors.items()}
    with pytest.raises(UserError, match="does not fit this network"):
        pipe.transformer.load_lora_adapter(wrong, prefix=None)


def test_a_prefix_that_no_tensor_has_is_logged(pipe, caplog):
    tensors = pipe.transformer.state_dict()
    logging.enable_propagation()
    try:
        pipe.transformer.load_lora_adapter({"unet.a": torch.zeros(1)}, prefix="transformer")
    finally:
        logging.disable_propagation()
    assert "No LoRA keys associated to ComplexityDiTTransformer2DModel" in caplog.text
    assert pipe.transformer.state_dict().keys() == tensors.keys()


def test_a_network_is_never_saved_as_a_pickle(tmp_path):
    model = small_network()
    with pytest.warns(UserWarning, match="safetensors are written instead"):
        model.save_pretrained(tmp_path / "a", safe_serialization=False)
    with pytest.warns(UserWarning, match="safetensors are written instead"):
        model.save_pretrained(tmp_path / "b", True, None, False)
    model.save_pretrained(tmp_path / "c")
    files = {path.name for path in (tmp_path / "c").iterdir()}
    assert "diffusion_pytorch_model.safetensors" in files
    for folder in ("a", "b"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == files


@torch.no_grad()
def test_auto_model_of_diffusers_finds_the_class(tmp_path, caplog):
    model = randomised(small_network())
    model.save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        own = ComplexityDiTTransformer2DModel.from_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    finally:
        logging.disable_propagation()
    assert "auto_map" not in caplog.text
    for other in (own, loaded):
        assert type(other) is ComplexityDiTTransformer2DModel
        assert torch.equal(other(*inputs()).sample, model(*inputs()).sample)
    own.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(str(tmp_path / "again"), trust_remote_code=True)
    assert type(again) is ComplexityDiTTransformer2DModel


def test_latents_as_image(pipe):
    """As diffusers' image-to-image pipelines take them; three channels are always pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    ).eval()  # fmt: skip
    network = randomised(small_network(in_channels=4))
    again = ComplexityDiTImg2ImgPipeline(network, pipe.scheduler, vae)
    again.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    # Without a step the latents are those of the image.
    latents = again(picture, strength=0.0, output_type="latent").images
    assert latents.shape == (1, 4, 8, 8)
    options = {"strength": 0.5, "num_images_per_prompt": 2}
    # The VAE has encoded one image for the latents and two for the pictures.
    np.testing.assert_allclose(
        paint(again, image=latents, **options), paint(again, image=picture, **options), atol=1e-5
    )
    with pytest.raises(UserError, match="leave height and width out"):
        again(latents, height=16)
    for kind, more in (
        (ComplexityDiTImg2ImgPipeline, {}),
        (ComplexityDiTInpaintPipeline, {"mask_image": torch.ones(8, 8)}),
    ):
        without = kind(network, pipe.scheduler)
        with pytest.raises(
            UserError, match="3 channels and the network 4: the pipeline has no VAE"
        ):
            without(picture[..., :8, :8], num_inference_steps=2, **more)
    inpainting = ComplexityDiTInpaintPipeline(network, pipe.scheduler, vae)
    with pytest.raises(UserError, match=r"outside|4 channels"):
        inpainting(latents, torch.ones(8, 8))
