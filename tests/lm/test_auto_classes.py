"""A saved folder loads with transformers' Auto classes, with and without the package."""

import json

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from complexity_lm import DeepConfig, DeepForCausalLM, DeepModel
from support.processes import python

LOAD = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "complexity_lm" not in sys.modules, "the folder must contain all code of the model"
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
expected = load_file(folder + "/expected.safetensors")
with torch.no_grad():
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])
text = model.generate(expected["ids"], max_new_tokens=4, do_sample=False)
assert torch.equal(text, expected["text"])

# The folder that this model saves is complete too.
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
assert torch.equal(again.generate(expected["ids"], max_new_tokens=4, do_sample=False), text)
print("fine")
"""

# The package cannot be imported, even if it is installed.
BLOCKED = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "complexity_lm":
            raise ModuleNotFoundError(name)
        return None

sys.meta_path.insert(0, Block())
"""


def test_folder_loads_without_the_package(lively, ids, tmp_path) -> None:
    model = lively(num_experts=3)
    folder = tmp_path / "deep"
    model.save_pretrained(folder)
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        expected = {"ids": ids, "logits": model(ids).logits, "text": text}
    save_file(expected, folder / "expected.safetensors")
    modules = str(tmp_path / "modules")
    done = python("-c", BLOCKED + LOAD, folder, HF_MODULES_CACHE=modules)
    assert done.stdout.strip().endswith("fine")


def test_folder_loads_without_remote_code_after_an_import(lively, ids, tmp_path) -> None:
    model = lively(num_experts=3, dynamics_placement="force")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DeepForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is DeepModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeepConfig
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_folder_has_an_auto_map_two_code_files_and_no_pickle(lively, tmp_path) -> None:
    lively().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_complexity.DeepConfig"
    assert auto_map["AutoModelForCausalLM"] == "modeling_complexity.DeepForCausalLM"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}
    code = {path.name for path in tmp_path.glob("*.py")}
    assert code == {"configuration_complexity.py", "modeling_complexity.py"}


def test_from_config_creates_a_new_model(tiny) -> None:
    model = AutoModelForCausalLM.from_config(tiny(dynamics_placement="stream"))
    assert type(model) is DeepForCausalLM
    assert model.config.dynamics_placement == "stream"
