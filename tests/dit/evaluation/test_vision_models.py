"""Feature extractors from transformers vision models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from complexity_dit.evaluation.networks import load_extractor
from inl_core.run.errors import UserError

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def write_processor(folder: Path, **size: object) -> None:
    values = {"image_mean": MEAN, "image_std": STD, **size}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    """A random DINOv2 of 2 layers at 28 px, as save_pretrained writes it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    folder = tmp_path / "dinov2"
    Dinov2Model(config).save_pretrained(folder)
    write_processor(folder, size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28})
    return folder


def noise(n: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def test_dinov2_features_equal_the_class_token(dinov2: Path) -> None:
    from transformers import AutoModel

    extractor = load_extractor(str(dinov2))
    assert extractor.name == "dinov2-32x2"
    assert extractor.prefixes == ("fd_dinov2", "kd_dinov2")
    assert not extractor.is_inception
    assert (extractor.feature_dim, extractor.resize) == (32, "bicubic-28")
    images = noise(3, 28, 28)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    model = AutoModel.from_pretrained(dinov2).eval()
    with torch.no_grad():
        expected = model(pixel_values=(images / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    assert extractor(noise(2, 50, 31)).shape == (2, 32)
    assert load_extractor(str(dinov2), dtype="bfloat16")(images).dtype == torch.float32


def test_clip_features_equal_the_projected_embedding(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    part = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    vision = part | {"image_size": 28, "patch_size": 14}
    CLIPModel(
        CLIPConfig(text_config=part, vision_config=vision, projection_dim=16)
    ).save_pretrained(tmp_path)
    write_processor(tmp_path, size=28)
    extractor = load_extractor(str(tmp_path))
    assert (extractor.name, extractor.feature_dim) == ("clip-32x1", 16)
    assert extractor.prefixes == ("fd_clip", "kd_clip")
    features = extractor(noise(2, 28, 28)).numpy()
    assert np.abs(features[0] - features[1]).max() > 1e-3


def test_changed_weights_change_the_identity(dinov2: Path) -> None:
    from safetensors.torch import load_file, save_file

    before = load_extractor(str(dinov2)).identity
    path = dinov2 / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})
    changed = load_extractor(str(dinov2)).identity
    assert changed["weights_sha256"] != before["weights_sha256"]
    write_processor(dinov2, size=28, image_mean=[0.0, 0.0, 0.0])
    assert load_extractor(str(dinov2)).identity["weights_sha256"] != changed["weights_sha256"]


def test_every_missing_tensor_is_an_error(dinov2: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = dinov2 / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        save_file({n: t for n, t in tensors.items() if n != name}, path, {"format": "pt"})
        with pytest.raises(UserError, match="is missing"):
            load_extractor(str(dinov2))


def test_a_config_of_endless_layers_is_refused_before_it_is_read(dinov2: Path) -> None:
    """The class of this config makes a name of every layer."""
    path = dinov2 / "config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": 10**8}
    del config["stage_names"], config["out_features"], config["out_indices"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_hidden_layers 100000000"):
        load_extractor(str(dinov2))


def test_a_folder_without_a_model_is_rejected(dinov2: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_extractor(str(tmp_path / "empty"))
    (dinov2 / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not define the preprocessing"):
        load_extractor(str(dinov2))
    write_processor(dinov2, size=28)
    (dinov2 / "model.safetensors").rename(dinov2 / "model.bin")
    with pytest.raises(UserError, match="save the model as safetensors"):
        load_extractor(str(dinov2))
