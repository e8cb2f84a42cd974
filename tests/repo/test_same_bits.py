"""The same seed gives the same bits, and another seed others: training and evaluation, on a CPU."""

import dataclasses

import torch
from safetensors.torch import load_file

from complexity_dit.config import EvalConfig, SampleConfig
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.training.train import train as train_images
from complexity_lm.train import train as train_text
from support.small_runs import dit_run, lm_run, write_texts


def weights(folder):
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return [load_file(path) for path in files]


def equal(ours, theirs):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def assert_the_seed_decides(train, run, tmp_path):
    made = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        out = tmp_path / name
        torch.rand(17)  # whatever the process drew before is of no effect
        folder = train(dataclasses.replace(run, out=str(out), seed=seed))
        made[name] = weights(folder), (out / "train_log.csv").read_bytes()
    assert equal(made["one"][0], made["again"][0])
    assert made["one"][1] == made["again"][1]
    assert not equal(made["one"][0], made["other"][0])
    assert made["one"][1] != made["other"][1]


def test_image_training(tmp_path):
    assert_the_seed_decides(train_images, dit_run(tmp_path), tmp_path)


def test_text_training(tmp_path):
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts")
    assert_the_seed_decides(train_text, lm_run(tmp_path, tmp_path / "texts"), tmp_path)


def test_evaluation(tmp_path):
    pipeline = train_images(dit_run(tmp_path / "run"))
    found = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        config = EvalConfig.brief(
            num_images=8, weights="random", kid_subset_size=4, cache=False, quiet=True
        )
        drawn = SampleConfig(num_inference_steps=3, seed=seed)
        found.append(evaluate(str(pipeline), "art", tmp_path / name, config, drawn)["metrics"])
    assert found[0] == found[1]
    assert found[0] != found[2]
