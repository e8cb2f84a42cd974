"""The process group of a command ends with it, and that of a caller does not."""

import pytest
from torch import distributed

import complexity_dit.cli.average
import complexity_dit.evaluation.evaluate
import complexity_dit.pipelines.sampling
from complexity_dit.cli import commands
from complexity_dit.config import EvalConfig, SampleConfig, StartConfig
from complexity_dit.distributed import own_process_group


def begin(*args: object, **kwargs: object) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)


def test_a_group_that_began_inside_ends_also_after_an_error():
    @own_process_group()
    def fails() -> None:
        begin()
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not distributed.is_initialized()


def test_a_group_of_the_caller_is_kept():
    begin()
    try:
        with own_process_group():
            pass
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()


def test_sample_and_evaluate_end_their_group(monkeypatch):
    monkeypatch.setattr(complexity_dit.pipelines.sampling, "sample", begin)
    monkeypatch.setattr(complexity_dit.evaluation.evaluate, "evaluate", begin)
    monkeypatch.setattr(complexity_dit.cli.average, "evaluate_lengths", begin)
    commands._sample(SampleConfig(), StartConfig())
    assert not distributed.is_initialized()
    for lengths in ([], [0.1]):
        commands._evaluate(EvalConfig(), lengths)
        assert not distributed.is_initialized()
