"""Training from an existing model: all its weights, or an adapter; and the upload at the end."""

import dataclasses
import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from complexity_lm import __main__ as cli
from complexity_lm.config import LoraOptions, ModelConfig, TrainConfig
from complexity_lm.inspect_model import inspect
from complexity_lm.loading import load, weights_hash
from complexity_lm.train import train
from inl_core.run.checkpoints import all_checkpoints
from inl_core.run.errors import UserError
from support.outcomes import rows_of

# PEFT uses a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def from_trained(small_run, trained, texts) -> TrainConfig:
    """A run of 8 steps from the weights of the finished one, on the digits in its documents."""
    model = ModelConfig()
    return dataclasses.replace(small_run, init_from=str(trained), model=model)


@pytest.fixture
def with_lora(from_trained) -> TrainConfig:
    """The same of an adapter."""
    pytest.importorskip("peft")
    return dataclasses.replace(from_trained, lora=LoraOptions(rank=2, alpha=4, dropout=0.1))


def losses_of(run: str | Path) -> list[float]:
    return [float(row["loss"]) for row in rows_of(run)]


def test_all_weights_are_trained_from_those_of_a_model(from_trained, trained, tmp_path) -> None:
    model = train(from_trained)
    assert losses_of(from_trained.out)[0] < losses_of(trained)[0] - 1
    assert (Path(from_trained.out) / "tokenizer" / "tokenizer.json").read_bytes() == (
        trained / "model" / "tokenizer.json"
    ).read_bytes()
    before, after = load(str(trained)).model, load(str(model)).model
    assert after.config.hidden_size == before.config.hidden_size
    moved = [
        not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)  # an equilibrium at its bound stays there

    # Resumed without its base, from the checkpoint alone.
    other = dataclasses.replace(from_trained, out=str(tmp_path / "other"))
    shutil.copytree(from_trained.out, other.out)
    shutil.rmtree(all_checkpoints(Path(other.out) / "checkpoints")[-1])
    train(dataclasses.replace(other, init_from=None, resume="auto"))
    assert losses_of(other.out) == losses_of(from_trained.out)
    assert weights_hash(load(other.out).model) == weights_hash(after)


def test_only_the_adapter_is_trained_and_every_command_opens_it(
    with_lora, trained, texts, capsys
) -> None:
    folder = train(with_lora)
    assert folder.name == "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", ADAPTER, "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "training.json",
    }  # fmt: skip
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(trained / "model")
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (2, 4, 0.1)

    base, tuned = load(str(trained)), load(with_lora.out)
    for name, parameter in base.model.named_parameters():
        stem, _, kind = name.rpartition(".")
        names = dict(tuned.model.named_parameters())
        assert torch.equal(parameter, names.get(name, names.get(f"{stem}.base_layer.{kind}")))
    ids = base.tokenizer("kalo mine", return_tensors="pt")["input_ids"]
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = tuned.model(ids).logits
        torch.testing.assert_close(logits, expected(ids).logits)
        assert (logits - base.model(ids).logits).abs().max() > 1e-3
    assert tuned.data == with_lora.data

    capsys.readouterr()  # what the training printed
    cli.run(["generate", with_lora.out, "--prompt", "Kalo", "--max_new_tokens", "3"])
    assert capsys.readouterr().out.startswith("Kalo")
    measured = json.loads((Path(with_lora.out) / "result.json").read_text())
    assert inspect(str(folder))["weights_sha256"] == measured["weights_sha256"]


def test_an_adapter_resumes_exactly(with_lora, tmp_path, trained) -> None:
    train(with_lora)
    again = dataclasses.replace(with_lora, out=str(tmp_path / "again"), resume="auto")
    shutil.copytree(with_lora.out, again.out)
    shutil.rmtree(all_checkpoints(Path(again.out) / "checkpoints")[-1])
    shutil.rmtree(Path(again.out) / "adapter")

    other = shutil.copytree(trained / "model", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({k: v * 1.01 for k, v in tensors.items()}, other / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="has other weights than the base"):
        train(dataclasses.replace(again, init_from=str(other)))
    rank = dataclasses.replace(again.lora, rank=3)
    with pytest.raises(UserError, match=r"lora\.rank is 2 there and 3 here"):
        train(dataclasses.replace(again, lora=rank))

    moved = shutil.copytree(trained, tmp_path / "moved")
    train(dataclasses.replace(again, init_from=str(moved)))
    assert losses_of(again.out) == losses_of(with_lora.out)
    for part in ("adapter", "checkpoints/step-00000008"):
        assert (Path(again.out) / part / ADAPTER).read_bytes() == (
            Path(with_lora.out) / part / ADAPTER
        ).read_bytes()


def test_settings_that_do_not_fit_are_refused(from_trained, with_lora) -> None:
    with pytest.raises(UserError, match="name it with --init_from"):
        dataclasses.replace(with_lora, init_from=None)
    with pytest.raises(UserError, match=r"model\.preset is '50m', but the network is that of"):
        dataclasses.replace(from_trained, model=ModelConfig(preset="50m"))
    targets = dataclasses.replace(with_lora.lora, targets=["to_q"])
    with pytest.raises(UserError, match=r"lora\.targets \['to_q'\]: "):
        train(dataclasses.replace(with_lora, lora=targets))
    data = dataclasses.replace(from_trained.data, context=25)
    with pytest.raises(UserError, match=r"data\.context is 25, but the model is made for 24"):
        train(dataclasses.replace(from_trained, data=data, out=from_trained.out + "2"))


@pytest.fixture
def adapter(with_lora, trained, tmp_path) -> Path:
    """An adapter of the finished run, without a step of training."""
    from peft import LoraConfig

    model = load(str(trained)).model
    model.name_or_path = str(trained / "model")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_anyone(adapter, trained, with_lora) -> None:
    evil = {"target_modules": "(.*)*$", "megatron_core": "os", "r": 2}
    edit(adapter, **evil)  # a pattern without end is not matched, a module not imported
    assert load(str(adapter)).tokenizer.get_vocab() == load(str(trained)).tokenizer.get_vocab()
    with pytest.raises(UserError, match="is an adapter: merge it into its model first"):
        train(dataclasses.replace(with_lora, init_from=str(adapter)))
    for changes, words in (
        ({"r": 10**6}, "have rank 1000000 for"),
        ({"peft_type": "IA3"}, "of the kind 'IA3'; LoRA alone"),
        ({"base_model_name_or_path": str(adapter)}, r"has no config\.json|cannot load"),
        ({"base_model_name_or_path": ""}, "names no base model"),
        ({"base_model_name_or_path": "./nowhere"}, "nowhere does not exist"),
    ):
        before = (adapter / "adapter_config.json").read_text()
        edit(adapter, **changes)
        with pytest.raises(UserError, match=words):
            load(str(adapter))
        (adapter / "adapter_config.json").write_text(before)
    tensors = load_file(adapter / ADAPTER)
    some = dict(list(tensors.items())[1:])
    save_file(some, adapter / ADAPTER)
    with pytest.raises(UserError, match="is missing"):
        load(str(adapter))
    save_file({k.replace("q_proj", "to_q"): v for k, v in tensors.items()}, adapter / ADAPTER)
    with pytest.raises(UserError, match="to_q', which the network has not"):
        load(str(adapter))


# Upload -------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch):
    """A fake Hub that records uploads."""
    files = {}

    class Repo:
        repo_id = "me/lm"

    def upload_folder(self, repo_id, folder_path, commit_message, create_pr):
        files.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        files["message"] = commit_message
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("inl_core.run.hub.unreachable", lambda: None)
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, exist_ok, private: Repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return files


def test_the_finished_model_is_uploaded(small_run, uploads, caplog) -> None:
    caplog.set_level("INFO")
    folder = train(dataclasses.replace(small_run, push_to_hub="me/lm"))
    assert uploads.pop("message") == "Upload model of step 8"
    assert uploads == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "uploaded to https://hub/me/lm" in caplog.text


def test_an_upload_that_cannot_work_is_refused_before_the_training(
    small_run, uploads, monkeypatch
) -> None:
    run = dataclasses.replace(small_run, push_to_hub="me/lm")

    def refuse(self, **_):
        response = httpx.Response(401, request=httpx.Request("GET", "https://hub"))
        raise HfHubHTTPError("Invalid user token.\nmore", response=response)

    monkeypatch.setattr(HfApi, "whoami", refuse)
    with pytest.raises(
        UserError, match=r"^cannot upload me/lm: Invalid user token\.; log in with `hf auth login`$"
    ):
        train(run)
    monkeypatch.setattr("inl_core.run.hub.unreachable", lambda: "cannot reach https://hub (x)")
    with pytest.raises(UserError, match=r"^cannot upload me/lm: cannot reach https://hub \(x\); "):
        train(run)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        train(run)
    assert not (Path(small_run.out) / "checkpoints").exists()


def test_a_failed_upload_leaves_the_finished_model(small_run, uploads, monkeypatch) -> None:
    def fail(self, *_, **__):
        response = httpx.Response(500, request=httpx.Request("POST", "https://hub"))
        raise HfHubHTTPError("500 Server Error\nmore", response=response)

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(UserError, match=r"cannot upload me/lm: 500 Server Error; .*hf upload"):
        train(dataclasses.replace(small_run, push_to_hub="me/lm"))
    assert load(small_run.out)
    assert (Path(small_run.out) / "result.json").exists()
