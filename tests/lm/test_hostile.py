"""Untrusted folders and texts: no pickle is opened, no code runs, unusual prompts work."""

import json
import os
import pickle
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from complexity_lm import DeepForCausalLM, DeepForSequenceClassification, sources
from complexity_lm.config import DataConfig
from complexity_lm.data import load_corpus
from complexity_lm.evaluate import _task_name
from complexity_lm.generate import generate, read_prompts
from complexity_lm.loading import load
from inl_core.run.errors import UserError
from support.hub import put_in_hub_cache


class Trap:
    """Writes a file when its pickle is opened."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.write_text, (self.proof, "ran")


@pytest.fixture
def model(trained, tmp_path) -> Path:
    """A copy of a model folder, to be modified."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (trained / "model").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_pickled_model_is_rejected_and_not_opened(model, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "proof")))
    with pytest.raises(UserError, match="cannot load a model"):
        load(str(model))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("model_type", ["deep", "foreign"])
def test_code_in_a_model_folder_does_not_run(model, tmp_path, model_type):
    proof = tmp_path / "proof"
    for code in model.glob("*.py"):
        code.unlink()
    (model / "trap.py").write_text(f"open({str(proof)!r}, 'w')\n")
    kind = json.loads((model / "config.json").read_text())["model_type"]
    names = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    edit(
        model / "config.json",
        auto_map=names, model_type=kind if model_type == "deep" else "foreign",
    )  # fmt: skip
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.T", "trap.T"]})
    if model_type == "deep":
        assert load(str(model)).data is not None
    else:
        with pytest.raises(UserError, match="cannot load a model"):
            load(str(model))
    assert not proof.exists()


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"num_hidden_layers": 3},
                                    {"hidden_size": 64}, {"vocab_size": 10**10}])  # fmt: skip
def test_weights_that_do_not_match_the_config_are_rejected(model, change):
    edit(model / "config.json", **change)
    with pytest.raises(UserError, match="cannot load a model"):
        load(str(model))


@pytest.mark.parametrize(
    ("kind", "key"),
    [("gemma3", "text_config.num_hidden_layers"), ("gpt_neo", "attention_types"),
     ("gpt2", "n_layer"), ("mamba", "num_hidden_layers"), ("qwen3_moe", "num_labels"),
     ("mixtral", "num_local_experts"), ("gpt_neo", "max_position_embeddings")],
)  # fmt: skip
def test_a_config_of_any_architecture_is_bounded_by_its_weights(model, kind, key):
    """Nested settings, lists and experts too: 10^9 of them would be built for hours."""
    count: object = [[["global"], 10**9]] if key == "attention_types" else 10**9
    for name in reversed(key.split(".")):
        count = {name: count}
    (model / "config.json").write_text(json.dumps({"model_type": kind} | count))
    with pytest.raises(UserError, match="cannot load a model"):
        load(str(model))


def test_a_model_of_the_hub_is_looked_at_as_a_folder(model, tmp_path, monkeypatch):
    snapshot = put_in_hub_cache(model, "some/model", tmp_path / "cache", monkeypatch)
    loaded = load("some/model")
    assert (loaded.name, loaded.data) == ("some/model", load(str(model)).data)
    before = (snapshot / "config.json").read_text()
    for change in ({"num_hidden_layers": 10**9}, {"vocab_size": 10**10}):
        edit(snapshot / "config.json", **change)
        with pytest.raises(UserError, match=r"cannot load a model from some/model: .*config\.json"):
            load("some/model")
        (snapshot / "config.json").write_text(before)
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it into the model"):
        load("some/model")
    with pytest.raises(UserError, match=r"cannot load a model from some/other: .+"):
        load("some/other")


@pytest.mark.parametrize("of_hub", [False, True], ids=["folder", "hub"])
@pytest.mark.parametrize(
    "cls", [DeepForCausalLM, DeepForSequenceClassification, AutoModelForCausalLM]
)
def test_from_pretrained_looks_before_it_builds(model, tmp_path, monkeypatch, cls, of_hub):
    name = str(model)
    if of_hub:
        model, name = put_in_hub_cache(model, "a/b", tmp_path / "cache", monkeypatch), "a/b"
    whole = (model / "config.json").read_text()
    cls.from_pretrained(name, num_labels=3)
    built = classmethod(lambda *_, **__: pytest.fail("it was built"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", built)
    layers = {"num_hidden_layers": 5000, "layer_types": None}
    for change, error in (
        (layers, r"has num_hidden_layers 5000; the weights next to it"),
        ({"vocab_size": 10**10}, r"config\.json describes a network of"),
    ):
        edit(model / "config.json", **change)
        with pytest.raises(UserError, match=error):
            cls.from_pretrained(name)
        (model / "config.json").write_text(whole)


def test_a_config_makes_no_list_of_endless_layers(model):
    edit(model / "config.json", num_hidden_layers=10**12, layer_types=None)
    with pytest.raises(StrictDataclassClassValidationError, match="must be at most 10000"):
        AutoConfig.from_pretrained(model)


def test_what_is_not_there_is_the_error_of_transformers(model, tmp_path, monkeypatch):
    put_in_hub_cache(model, "a/b", tmp_path / "cache", monkeypatch)
    for name in (tmp_path, "a/other"):
        with pytest.raises(OSError, match=r"no file named|a/other|couldn't find"):
            DeepForCausalLM.from_pretrained(name)


def test_a_folder_with_an_adapter_is_refused(model):
    """peft would match its target_modules, a regular expression, and may fetch its base."""
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/other"}))
    with pytest.raises(UserError, match="merge it into the model"):
        load(str(model))


def test_an_index_that_names_a_file_elsewhere_is_refused(model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "secret.safetensors")
    names = load_file(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../secret.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a file beside it"):
        load(str(model))


def test_a_missing_tensor_is_rejected(model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "mlp" in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, path, {"format": "pt"})
    with pytest.raises(UserError, match="is missing"):
        load(str(model))


@pytest.mark.parametrize(
    "content",
    [{"data": {"source": 5}}, {"data": []}, {"data": {"evil": 1}}, {"tokenizer_sha256": 7}],
)
def test_an_invalid_training_file_is_rejected(model, content):
    edit(model / "training.json", **content)
    with pytest.raises(UserError, match=r"cannot read .*training\.json"):
        load(str(model))


CONTROL = ["\x00", "\x1b[2J\x07", "a\r\nb", "\u2028\u202e", "\ufffe", "𝒳" * 3, "\x85\x0c\x1c"]


def test_prompts_may_contain_control_characters(trained, tmp_path):
    loaded = load(str(trained))
    made = list(generate(loaded, CONTROL, {"max_new_tokens": 2, "do_sample": False}))
    for prompt, texts in zip(CONTROL, made, strict=True):
        assert texts[0].startswith(prompt)


def test_only_line_ends_separate_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes('one\x0ctwo\u2028three\r\n"four\\u000cfive"\n'.encode())
    assert read_prompts(None, str(path), None) == ["one\x0ctwo\u2028three", "four\x0cfive"]


def test_half_a_surrogate_pair_is_rejected(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('"\\ud800"\n')
    with pytest.raises(UserError, match="half a surrogate pair"):
        read_prompts(None, str(path), None)


# -- data ------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path) -> Path:
    """A file that no data set here may read."""
    path = tmp_path / "secret.jsonl"
    path.write_text('{"text": "the secret of the user"}\n' * 50)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "own.jsonl").write_text('{"text": "public"}\n' * 50)
    return folder


CARD = "---\nconfigs:\n- config_name: default\n  {}\n---\n"


@pytest.mark.parametrize(
    "names",
    ["data_files: {}", "data_files: ../secret.jsonl", "data_dir: ..",
     "data_files: [own.jsonl, {}]", "data_files: [{{split: train, path: [{}]}}]"],
)  # fmt: skip
def test_a_data_set_whose_card_names_a_file_elsewhere_is_refused(folder, secret, names):
    (folder / "README.md").write_text(CARD.format(names.format(secret)))
    with pytest.raises(UserError, match="which lies outside"):
        load_corpus(DataConfig(source=f"hub:{folder}", holdout=0))


def test_what_the_check_of_the_card_overlooks_is_not_read_either(folder, secret, monkeypatch):
    (folder / "README.md").write_text(CARD.format(f"data_files: {secret}"))
    monkeypatch.setattr(sources, "check_card", lambda folder: None)
    with pytest.raises(UserError, match=r"secret\.jsonl lies outside"):
        load_corpus(DataConfig(source=f"hub:{folder}", holdout=0))


@pytest.mark.parametrize("scheme", ["hub", "text"])
def test_a_link_out_of_a_data_set_is_refused(folder, secret, scheme):
    (folder / "more.jsonl").symlink_to(secret)
    with pytest.raises(UserError, match=r"more\.jsonl lies outside .*secret\.jsonl"):
        load_corpus(DataConfig(source=f"{scheme}:{folder}", files="*.jsonl", holdout=0))


def test_files_that_are_no_text_are_refused_and_no_script_runs(folder, tmp_path):
    (folder / "own.jsonl").rename(folder / "own.tar")
    with pytest.raises(UserError, match="files of the kind 'webdataset'"):
        load_corpus(DataConfig(source=f"hub:{folder}", holdout=0))
    proof = tmp_path / "proof"
    (folder / "data.py").write_text(f"open({str(proof)!r}, 'w')\n")
    with pytest.raises(UserError, match="scripts are no longer supported"):
        load_corpus(DataConfig(source=f"hub:{folder}", holdout=0))
    assert not proof.exists()


def test_a_picture_that_a_row_names_is_not_opened(folder, tmp_path):
    """The card gives a column the type image; streaming would open the path in it."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)  # opening it would wait for ever
    row = json.dumps({"text": "a", "picture": str(pipe)})
    (folder / "own.jsonl").write_text(f"{row}\n" * 50)
    features = "[{name: text, dtype: string}, {name: picture, dtype: image}]"
    (folder / "README.md").write_text(f"---\ndataset_info: {{features: {features}}}\n---\n")
    corpus = load_corpus(DataConfig(source=f"hub:{folder}", holdout=0))
    assert next(iter(corpus.train)) == {"text": "a"}


def test_a_task_file_and_what_it_includes_name_no_code(tmp_path):
    (tmp_path / "code.yaml").write_text("doc_to_text: !function code.run\n")
    (tmp_path / "a.yaml").write_text("task: mine\ninclude: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: [a.yaml]\n")  # a circle ends
    assert _task_name(tmp_path / "a.yaml") == "mine"
    (tmp_path / "b.yaml").write_text("include: [code.yaml]\n")
    for name in ("a.yaml", "code.yaml"):
        with pytest.raises(UserError, match="tags such as '!function' are not read"):
            _task_name(tmp_path / name)
    (tmp_path / "none.yaml").write_text("group: x\n")
    with pytest.raises(UserError, match="no key `task`"):
        _task_name(tmp_path / "none.yaml")
