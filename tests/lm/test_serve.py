"""`transformers serve` on a saved folder, as docs/how-to/serve.md shows it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from transformers.utils.import_utils import is_serve_available

from complexity_lm import (
    DeepConfig,
    DeepForCausalLM,
    DeepForQuestionAnswering,
    DeepForSequenceClassification,
    DeepForTokenClassification,
    DeepModel,
)
from complexity_lm.tokenizer import CHAT_TEMPLATE, train_tokenizer
from support.processes import python

needs_serving = pytest.mark.skipif(
    not is_serve_available(), reason="needs pip install 'transformers[serving]'"
)


def test_transformers_finds_the_class_that_a_saved_config_names(tmp_path, tiny):
    """The server looks the architecture up there, in a process that imports only transformers."""
    kinds = [
        DeepForSequenceClassification, DeepForTokenClassification, DeepForQuestionAnswering,
        DeepForCausalLM, DeepModel,
    ]  # fmt: skip
    for kind in kinds:
        kind(tiny()).save_pretrained(tmp_path / kind.__name__)
    code = (
        "import sys, transformers\n"
        "from transformers import AutoProcessor\n"  # replaces sys.modules["transformers"]
        "for folder in sys.argv[1:]:\n"
        "    c = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)\n"
        "    kind = getattr(transformers, c.architectures[0])\n"
        "    model = kind.from_pretrained(folder, trust_remote_code=True)\n"
        "    assert 'complexity_lm' not in sys.modules\n"
        "    print(type(model).__name__)\n"
    )
    folders = [tmp_path / kind.__name__ for kind in kinds]
    done = python("-c", code, *folders, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.stdout.split() == [kind.__name__ for kind in kinds]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """A running server: its address, and the folder of the model."""
    folder = tmp_path_factory.mktemp("serve") / "model"
    tokenizer: Any = train_tokenizer(["Once upon a time there was a small model."], 300)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = DeepConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    DeepForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    port = _free_port()
    log = folder.parent / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder),
                "--trust-remote-code", "--device", "cpu", "--port", str(port),
            ],
            stdout=sink, stderr=sink, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            address = f"http://localhost:{port}"
            while True:
                assert process.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield address, str(folder)
        finally:
            process.terminate()
            process.wait(30)


def _post(address: str, body: dict) -> dict:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_serving
def test_a_saved_folder_is_served(server: tuple[str, str]):
    """Text and conversations, over HTTP."""
    address, folder = server
    answer = _post(
        f"{address}/v1/completions", {"model": folder, "prompt": "Once upon", "max_tokens": 4}
    )
    assert answer["usage"]["completion_tokens"] >= 1
    assert isinstance(answer["choices"][0]["text"], str)
    answer = _post(
        f"{address}/v1/chat/completions",
        {
            "model": folder, "max_tokens": 4, "stream": False,
            "messages": [{"role": "user", "content": "Once"}],
        },
    )  # fmt: skip
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert isinstance(message["content"], str)
    assert answer["usage"]["completion_tokens"] >= 1
