"""Which attention the image model uses: products in bf16, or the backend that the user named."""

import pytest
import torch
from diffusers import attention_backend

from complexity_dit.models import transformer
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel

T = torch.full((3,), 500.0)


def model_of(**changes):
    torch.manual_seed(0)
    model = ComplexityDiTTransformer2DModel(
        sample_size=16, hidden_size=64, num_layers=2, num_attention_heads=4, **changes
    )
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def test_bf16_on_a_cpu_uses_products_unless_a_backend_is_named(product_calls, monkeypatch):
    model, x = model_of().to(torch.bfloat16), torch.randn(3, 3, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        own = model(x, T, return_dict=False)[0]
        assert len(product_calls) == 2
        with attention_backend("_native_math"):
            other = model(x, T, return_dict=False)[0]
        monkeypatch.setattr(transformer, "_BACKEND_OF_ENVIRONMENT", True)
        model(x, T)
        monkeypatch.undo()
        model.set_attention_backend("native")
        model(x, T)
    assert len(product_calls) == 2
    torch.testing.assert_close(own, other, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_an_image_has_the_same_bits_in_any_batch_in_bf16(product_calls, kv_heads):
    x = torch.randn(3, 3, 16, 16)
    model = model_of(num_key_value_heads=kv_heads)
    for network, images in ((model, x), (model_of().to(torch.bfloat16), x.to(torch.bfloat16))):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, images.dtype == torch.float32):
            # Chunks of a fixed size, as the sampler runs them, with other images beside it.
            whole = network(images, T, return_dict=False)[0]
            turned = network(images.roll(1, 0), T, return_dict=False)[0].roll(-1, 0)
        assert torch.equal(whole, turned)
    assert len(product_calls) == 8


def test_gradients_under_autocast_are_those_of_fp64(product_calls):
    model, x = model_of(), torch.randn(3, 3, 16, 16)
    exact = model_of().double()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, T, return_dict=False)[0]
    out.float().square().mean().backward()
    exact(x.double(), T.double(), return_dict=False)[0].square().mean().backward()
    assert len(product_calls) == 2
    for (name, a), b in zip(model.named_parameters(), exact.parameters(), strict=True):
        if b.grad is not None and b.grad.norm() > 1e-6:
            assert (a.grad - b.grad).norm() < 0.1 * b.grad.norm(), name


def test_it_compiles_as_one_graph(product_calls):
    model, x = model_of(), torch.randn(3, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, T, return_dict=False)[0]
        torch.testing.assert_close(compiled(x, T, return_dict=False)[0], expected)
