"""int8 weights of torchao: a network and a pipeline are saved and loaded with them."""

import numpy as np
import pytest
import torch

from complexity_dit import ComplexityDiTPipeline, ComplexityDiTTransformer2DModel
from support.networks import randomised, small_network


@pytest.mark.filterwarnings("default")
def test_int8_weights_are_saved_and_loaded(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import FlowMatchEulerDiscreteScheduler, TorchAoConfig

    plain = randomised(small_network()).eval()
    plain.save_pretrained(tmp_path / "plain")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    small = ComplexityDiTTransformer2DModel.from_pretrained(
        tmp_path / "plain", quantization_config=settings
    )
    kinds = {type(p.data).__name__ for p in small.parameters()}
    assert "Int8Tensor" in kinds
    batch = torch.randn(2, 3, 8, 8), torch.tensor([300.0, 800.0]), torch.tensor([[0, 1], [2, -1]])
    with torch.no_grad():
        out, expected = small(*batch).sample, plain(*batch).sample
        assert 0 < (out - expected).norm() / expected.norm() < 0.05
        small.save_pretrained(tmp_path / "small")
        again = ComplexityDiTTransformer2DModel.from_pretrained(tmp_path / "small")
        torch.testing.assert_close(again(*batch).sample, out)

    pipe = ComplexityDiTPipeline(small, FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "pipeline")
    other = ComplexityDiTPipeline.from_pretrained(tmp_path / "pipeline")
    pictures = []
    for one in (pipe, other):
        one.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(one(num_inference_steps=2, generator=generator, output_type="np").images)
    np.testing.assert_allclose(*pictures, atol=1e-5)
