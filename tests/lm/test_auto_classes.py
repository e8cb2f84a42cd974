"""A saved folder loads through transformers' Auto classes, with and without our package."""

import json
import os
import subprocess
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from complexity_lm import DeepConfig, DeepForCausalLM, DeepModel

STRANGER = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "complexity_lm" not in sys.modules, "the folder must carry all of the model's code"
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
wanted = load_file(folder + "/wanted.safetensors")
with torch.no_grad():
    torch.testing.assert_close(model(wanted["ids"]).logits, wanted["logits"])
text = model.generate(wanted["ids"], max_new_tokens=4, do_sample=False)
assert torch.equal(text, wanted["text"])

# What it saves loads again, and is as complete.
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
assert torch.equal(again.generate(wanted["ids"], max_new_tokens=4, do_sample=False), text)
print("fine")
"""

# Neither our package nor a copy of its folder can be found, whatever is installed.
BLOCKED = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "complexity_lm":
            raise ModuleNotFoundError(name)
        return None

sys.meta_path.insert(0, Block())
"""


def test_a_process_without_our_package_loads_the_folder(lively, ids, tmp_path) -> None:
    model = lively(num_experts=3)
    folder = tmp_path / "deep"
    model.save_pretrained(folder)
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        wanted = {"ids": ids, "logits": model(ids).logits, "text": text}
    save_file(wanted, folder / "wanted.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + STRANGER, str(folder)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("fine")


def test_after_an_import_the_folder_needs_no_trust(lively, ids, tmp_path) -> None:
    model = lively(num_experts=3, dynamics_placement="force")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DeepForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is DeepModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeepConfig
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_folder_says_where_its_code_is_and_holds_no_pickle(lively, tmp_path) -> None:
    lively().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_complexity.DeepConfig"
    assert auto_map["AutoModelForCausalLM"] == "modeling_complexity.DeepForCausalLM"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}
    code = {path.name for path in tmp_path.glob("*.py")}
    assert code == {
        "configuration_complexity.py",
        "modeling_complexity.py",
    }


def test_from_config_makes_a_fresh_model(tiny) -> None:
    model = AutoModelForCausalLM.from_config(tiny(dynamics_placement="stream"))
    assert type(model) is DeepForCausalLM
    assert model.config.dynamics_placement == "stream"
