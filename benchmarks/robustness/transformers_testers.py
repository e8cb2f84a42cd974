"""The tests that transformers has for each of its models, on ours and on its Llama.

They are in its source distribution, of the version that is installed:

    pip download transformers==5.23.0 --no-binary :all: --no-deps
    tar xf transformers-5.23.0.tar.gz
    export TRANSFORMERS_SOURCE=transformers-5.23.0
    python -m pytest -o addopts= -o filterwarnings=default -rfs \\
        benchmarks/robustness/transformers_testers.py -k Default

The distribution is without the tests of generation and export and without two modules of helpers,
which are replaced here. Needs `parameterized`.
"""

import os
import socket
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
import torch.multiprocessing
import transformers
from torch import distributed
from transformers import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from complexity_lm import (
    DeepForCausalLM,
    DeepForQuestionAnswering,
    DeepForSequenceClassification,
    DeepForTokenClassification,
    DeepModel,
)

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if SOURCE is None:
    pytest.skip("TRANSFORMERS_SOURCE names no source of transformers", allow_module_level=True)


def in_process(rank, world, port, function, arguments):
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    distributed.init_process_group("gloo")
    function(rank, *arguments)
    distributed.barrier()
    distributed.destroy_process_group()


def run_distributed(world_size):
    """Call a function of transformers' tests in several processes."""

    def decorated(function):
        def call(*arguments):
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            torch.multiprocessing.spawn(
                in_process, (world_size, port, function, arguments), nprocs=world_size
            )

        return call

    return decorated


MISSING = {
    "exporters.test_export": {"ExportTesterMixin": object},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "distributed_testing_utils": {"run_distributed": run_distributed},
}
sys.path.insert(0, str(Path(SOURCE).resolve()))
sys.modules["tests"] = ModuleType("tests")
sys.modules["tests"].__path__ = [str(Path(SOURCE).resolve() / "tests")]
for name, contents in MISSING.items():
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = ModuleType(".".join(["tests", *parts[:end]]))
        module.__path__ = []
        sys.modules.setdefault(module.__name__, module)
    vars(sys.modules[f"tests.{name}"]).update(contents)

from tests import test_tensor_parallel_mixin as tensor_parallel  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # of every kind of model
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BATCH, LENGTH, LABELS = 13, 7, 3


class ModelTester:
    """What the tests ask of the model: sizes, a config, a batch."""

    batch_size, seq_length, key_length, num_labels, is_training = (
        BATCH,
        LENGTH,
        LENGTH,
        LABELS,
        True,
    )

    def __init__(self, test):
        self.test = test
        self.base_model_class, self.causal_lm_class = test.all_model_classes[:2]
        vars(self).update(SIZES)

    def get_config(self):
        return self.causal_lm_class.config_class(**SIZES, **self.test.settings)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([BATCH, LENGTH], SIZES["vocab_size"])
        mask = torch.tril(torch.ones_like(ids))
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Suite(ModelTesterMixin, TrainingTesterMixin, tensor_parallel.TensorParallelTesterMixin):
    all_model_classes = (
        DeepModel, DeepForCausalLM, DeepForSequenceClassification, DeepForTokenClassification,
        DeepForQuestionAnswering,
    )  # fmt: skip
    settings: ClassVar = {}
    model_tester = None
    # It asks for the tests that the distribution lacks.
    test_generation_tester_mixin_inheritance = None

    def setUp(self):
        self.model_tester = ModelTester(self)

    def head(self, index, **labels):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.num_labels = LABELS
        config.problem_type = labels.pop("problem_type", None)
        return self.all_model_classes[index](config).eval()(inputs["input_ids"], **labels)

    def test_sequence_classification(self):
        for problem, labels in (
            (None, ids_tensor([BATCH], 2)),
            ("single_label_classification", ids_tensor([BATCH], 2)),
            ("multi_label_classification", ids_tensor([BATCH, LABELS], 2).float()),
        ):
            out = self.head(2, problem_type=problem, labels=labels)
            assert out.logits.shape == (BATCH, LABELS)

    def test_token_classification(self):
        out = self.head(3, labels=ids_tensor([BATCH, LENGTH], LABELS))
        assert out.logits.shape == (BATCH, LENGTH, LABELS)

    def test_question_answering(self):
        assert self.head(4).start_logits.shape == (BATCH, LENGTH)


class DefaultTest(Suite, unittest.TestCase):
    pass


class BranchTest(Suite, unittest.TestCase):
    settings: ClassVar = {"dynamics_placement": "branch", "dynamics_adaptive": "token"}


class RoutedTest(Suite, unittest.TestCase):
    settings: ClassVar = {"num_experts": 3}


class LlamaTest(Suite, unittest.TestCase):
    all_model_classes = (
        LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification,
        LlamaForQuestionAnswering,
    )  # fmt: skip


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
