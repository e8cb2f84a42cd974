"""Model cards, variants, metadata and uploads of a pipeline folder."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import safe_open

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.model_card import write_card
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder
from support.networks import small_vae

RESULT = Path("docs/results/wikiart-cpu/result-step-00005600.json")
WIKIART = {"source": "imagefolder:/home/someone/wikiart", "resolution": 48, "holdout": 0.2,
           "flip": True}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_a_card_has_metadata_metrics_protocol_and_licence(pipe, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(WIKIART))
    pipe.save_pretrained(tmp_path, result=RESULT, grid=Image.new("RGB", (9, 9)))
    card = ModelCard.load(tmp_path / "README.md")
    data, result = card.data, json.loads(RESULT.read_text())
    assert (data.library_name, data.license) == ("diffusers", "other")
    assert data.license_name == "non-commercial-research"
    values = {r.metric_type: r.metric_value for r in data.eval_results}
    assert values["fid"] == result["metrics"]["fid"]
    assert values["recall"] == result["metrics"]["recall"]
    assert {r.dataset_split for r in data.eval_results} == {"heldout"}
    for words in ("n-commercial research", "| FID | 118.4 |", "2048 samples against 2048 held-out",
                  "20 steps, guidance 1", "![Samples](samples.png)", "**style** (3): Cubism",
                  'pipe(labels={"style": "Cubism", "genre": "landscape"})',
                  "2 layers, 32 wide", "## Limits",
                  "wikiart at 48 px, 20% of the"):  # fmt: skip
        assert words in card.text, words
    assert "/home" not in str(card)  # no local path
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (9, 9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "20 steps, guidance 1, seed 0"),
        ({"guidance_scale": 2.0, "guidance_interval": [0.3, 1]}, "guidance 2 at noise levels 0.3"),
        ({"guidance_scale": 2.0, "autoguidance": "runs/early"}, "steps, autoguidance 2, seed"),
        ({"internal_guidance_scale": 1.5}, "steps, guidance 1, internal guidance 1.5, seed"),
    ],
)
def test_a_card_names_the_guidance_of_its_numbers(pipe, tmp_path, changes, words):
    result = json.loads(RESULT.read_text())
    result["settings"]["sample"] |= changes
    pipe.save_pretrained(tmp_path, result=result)
    assert words in ModelCard.load(tmp_path / "README.md").text


def test_a_card_without_data_and_result_states_none(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "No result was given" in card.text
    assert "State it before you publish" in card.text
    assert "samples.png" not in card.text


def test_an_edited_card_is_kept_and_a_written_one_is_replaced(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    write_card(tmp_path, RESULT)
    card = tmp_path / "README.md"
    assert "118.4" in card.read_text()
    pipe.save_pretrained(tmp_path)
    assert "118.4" not in card.read_text()
    card.write_text("# Mine\n")
    pipe.save_pretrained(tmp_path)
    assert card.read_text() == "# Mine\n"


def test_the_card_of_a_run_has_its_name_and_code_that_runs(pipe, tmp_path, monkeypatch):
    run = tmp_path / "my run"
    with atomic_folder(run / "pipeline") as scratch:
        pipe.save_pretrained(scratch)
    text = (run / "pipeline" / "README.md").read_text()
    assert "\n# my run\n" in text
    assert "partial" not in text
    monkeypatch.chdir(run)
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("pipe(", "pipe(num_inference_steps=1, "), names)
    assert names["image"].size == (8, 8)


def test_the_code_of_a_card_runs(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    write_card(tmp_path / "model", name=str(tmp_path / "model"))
    text = (tmp_path / "model" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("pipe(", "pipe(num_inference_steps=1, "), names)
    assert names["image"].size == (8, 8)


def test_a_folder_does_not_say_where_it_was_loaded_from(pipe, tmp_path):
    pipe.register_modules(vae=small_vae())
    pipe.save_pretrained(tmp_path / "first")
    loaded = ComplexityDiTPipeline.from_pretrained(tmp_path / "first")
    assert loaded.transformer.config["_name_or_path"]
    loaded.save_pretrained(tmp_path / "second")
    loaded.transformer.save_pretrained(tmp_path / "third")
    for path in (tmp_path / name for name in ("second", "third")):
        for file in path.rglob("*.json"):
            assert str(tmp_path) not in file.read_text(), file


def test_variants(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    other = ComplexityDiTTransformer2DModel.from_config(pipe.transformer.config)
    pipe.register_modules(transformer=other)
    pipe.save_pretrained(tmp_path, variant="ema")
    pipe.to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    files = {path.name for path in (tmp_path / "transformer").glob("*.safetensors")}
    assert files == {WEIGHTS, "diffusion_pytorch_model.ema.safetensors",
                     "diffusion_pytorch_model.fp16.safetensors"}  # fmt: skip
    half = ComplexityDiTPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert half.transformer.dtype == torch.float16
    ema = DiffusionPipeline.from_pretrained(tmp_path, variant="ema", trust_remote_code=True)
    other = other.float()
    for (name, p), q in zip(other.named_parameters(), ema.transformer.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, rtol=2e-3, atol=1e-6)  # through fp16
    raw = ComplexityDiTPipeline.from_pretrained(tmp_path)
    assert not torch.equal(raw.transformer.proj_out.weight, ema.transformer.proj_out.weight)
    with pytest.raises((OSError, ValueError), match="bf16"):
        ComplexityDiTPipeline.from_pretrained(tmp_path, variant="bf16")


def test_the_header_of_weights_has_class_and_config(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) > 1  # in every shard
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["format"] == "pt"
        assert metadata["complexity_dit.class"] == "ComplexityDiTTransformer2DModel"
        config = json.loads(metadata["complexity_dit.config"])
        assert ComplexityDiTTransformer2DModel.from_config(config).config.num_layers == 2
    again = ComplexityDiTPipeline.from_pretrained(tmp_path)
    for p, q in zip(again.transformer.parameters(), pipe.transformer.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_transformer_loads_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    model = ComplexityDiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(model.proj_out.weight, pipe.transformer.proj_out.weight)
    # AutoModel reads the pipeline's index first, and refuses the module that it names.
    with pytest.raises(ValueError, match="modeling_complexity_dit is not one of the libraries"):
        AutoModel.from_pretrained(tmp_path, subfolder="transformer")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake Hub that records uploads."""
    calls = []

    class Repo:
        def __init__(self, repo_id):
            self.repo_id = repo_id

    def create_repo(self, repo_id, exist_ok, private):
        validate_repo_id(repo_id)
        calls.append(("create", repo_id, private))
        return Repo(repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message, create_pr):
        files = {str(p.relative_to(folder_path)): p.read_bytes()
                 for p in Path(folder_path).rglob("*") if p.is_file()}  # fmt: skip
        calls.append(("upload", repo_id, commit_message, create_pr, files))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("inl_core.run.hub.unreachable", lambda: None)
    return calls


def test_push_to_hub_uploads_a_folder_that_loads(pipe, hub, tmp_path):
    where = pipe.push_to_hub("me/dit", private=True, commit_message="First", result=RESULT)
    assert where == "https://hub/me/dit"
    create, (_, repo, message, is_pr, files) = hub
    assert create == ("create", "me/dit", True)
    assert (repo, message, is_pr) == ("me/dit", "First", False)
    assert "118.4" in files["README.md"].decode()
    assert 'from_pretrained("me/dit"' in files["README.md"].decode()
    for name, content in files.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    there = DiffusionPipeline.from_pretrained(tmp_path / "there", trust_remote_code=True)
    assert there.id2label == pipe.id2label
    pipe.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert hub[-1][1] == "me/mine"
    assert hub[-1][2] == "Upload ComplexityDiTPipeline"
    assert np.array_equal([*files], [*hub[-1][4]])


def test_failed_uploads_are_errors_of_one_line(pipe, hub, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot upload a b c: Repo id must"):
        pipe.push_to_hub("a b c")

    def refuse(self, *args, **kwargs):
        response = httpx.Response(401, request=httpx.Request("POST", "https://hub"))
        raise HfHubHTTPError("401 Client Error\nmore", response=response)

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"^cannot upload me/x: 401 Client Error; save_pretr.*$"):
        pipe.push_to_hub("me/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        pipe.push_to_hub("me/x")
    # The folder itself is complete.
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        pipe.save_pretrained(tmp_path / "x", push_to_hub=True)
    assert ComplexityDiTPipeline.from_pretrained(tmp_path / "x").id2label == pipe.id2label
