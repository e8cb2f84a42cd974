"""Cached latents: encoding, resuming, training, sampling, and damaged caches."""

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from complexity_dit.config import DataConfig, EvalConfig, SampleConfig, TrainConfig
from complexity_dit.data import encode as encode_module
from complexity_dit.data.dataset import load_data
from complexity_dit.data.encode import encode
from complexity_dit.data.latents import (
    load_training_data,
    on_training_device,
    open_latent_space,
    part_path,
)
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.models.vae import load_vae, posterior
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.training.batches import StepBatches, step_loader
from complexity_dit.training.train import train
from inl_core.run.errors import UserError
from support.locks import locked_elsewhere
from support.processes import torchrun

IMAGES = 24


@pytest.fixture(scope="module")
def paintings(tmp_path_factory) -> Path:
    """Pictures of 16 px in two folders, which are their labels."""
    folder = tmp_path_factory.mktemp("paintings")
    draw = np.random.default_rng(0)
    for i in range(IMAGES):
        style = folder / ("Cubism" if i % 2 else "Fauvism")
        style.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            style / f"{i:02}.png"
        )
    return folder


@pytest.fixture(scope="module")
def kl(tmp_path_factory) -> str:
    """A small AutoencoderKL with random weights: 2 times smaller, 4 channels, a real posterior."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("kl")
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A small TinyAutoencoder with random weights: 4 times smaller, 6 channels."""
    torch.manual_seed(1)
    vae = TinyAutoencoder(
        latent_channels=6, block_out_channels=(8, 8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), pool_channels=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def caches(paintings, tiny, kl, tmp_path_factory) -> dict[str, Path]:
    """One complete cache per VAE, in three parts; tests that damage one copy it first."""
    out = tmp_path_factory.mktemp("caches")
    return {
        name: encode(pictures(paintings, vae), out / name, batch_size=4, part_size=10)
        for name, vae in (("tiny", tiny), ("kl", kl))
    }


def pictures(paintings: Path, vae: str | None) -> DataConfig:
    return DataConfig(source=f"imagefolder:{paintings}", resolution=16, holdout=0.25, vae=vae)


@pytest.fixture
def source(paintings, tiny) -> DataConfig:
    return pictures(paintings, tiny)


@pytest.fixture
def copied(caches, tmp_path) -> Path:
    """A cache of the small TinyAutoencoder that a test may damage."""
    return Path(shutil.copytree(caches["tiny"], tmp_path / "copied"))


def as_latents(cache: Path) -> DataConfig:
    return DataConfig(source=f"latents:{cache}", resolution=16, holdout=0.25)


def short_run(data: DataConfig, out: Path) -> TrainConfig:
    config = TrainConfig(
        out=str(out), steps=4, mixed_precision="no", batch_size=4, log_every=2, checkpoint_every=4
    )
    shape = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    model = dataclasses.replace(config.model, patch_size=2, overrides=shape)
    return dataclasses.replace(config, data=data, model=model)


def bytes_of(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_train_sample_evaluate(kind, caches, paintings, tmp_path):
    folder = train(short_run(as_latents(caches[kind]), tmp_path / "run"))
    pipe = ComplexityDiTPipeline.from_pretrained(folder)
    assert pipe.sample_size == 16
    assert pipe.transformer.config.in_channels == pipe.vae.config.latent_channels
    result = evaluate(
        folder, f"imagefolder:{paintings}", None,
        EvalConfig(num_images=4, weights="random", quiet=True, cache=False, kid_subsets=2),
        SampleConfig(num_inference_steps=1),
    )  # fmt: skip
    # What is held out of training on latents is what training on pixels would hold out.
    held_out = load_data(pictures(paintings, None), "heldout")
    assert result["reference_fingerprint"] == held_out.fingerprint


def test_pipeline_decodes_with_the_statistics_of_the_cache(caches, tmp_path):
    pipe = ComplexityDiTPipeline.from_pretrained(
        train(short_run(as_latents(caches["tiny"]), tmp_path / "run"))
    )
    pipe.set_progress_bar_config(disable=True)
    space = open_latent_space(as_latents(caches["tiny"]))
    x = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2,
             output_type="latent").images  # fmt: skip
    images = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2,
                  output_type="pt").images  # fmt: skip
    z = x * torch.tensor(space.std).view(-1, 1, 1) + torch.tensor(space.mean).view(-1, 1, 1)
    expected = (space.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected)


def test_a_process_that_imports_only_diffusers_samples_from_latents(caches, tmp_path):
    folder = train(short_run(as_latents(caches["tiny"]), tmp_path / "run"))
    script = f"""
import numpy, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
pipe.save_pretrained({str(tmp_path / "again")!r})
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
image = pipe(num_inference_steps=1, output_type="np",
             generator=torch.Generator().manual_seed(0)).images
numpy.save({str(tmp_path / "image.npy")!r}, image)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pipe = ComplexityDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=1,
                    output_type="np").images  # fmt: skip
    assert np.array_equal(np.load(tmp_path / "image.npy"), expected)


@pytest.mark.parametrize("kind", ["tiny", "kl"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_latents_are_those_of_the_pictures_and_of_their_mirror_images(
    kind, split, caches, paintings, tiny, kl
):
    latents = load_training_data(as_latents(caches[kind]), split)
    pixels = load_data(pictures(paintings, None), split)
    assert len(latents) == len(pixels)
    assert latents.label_names == pixels.label_names
    assert torch.equal(latents.labels, pixels.labels)
    indices, flips = [3, 0, 3], torch.tensor([False, True, True])
    noise = torch.randn(3, latents.channels, latents.sample_size, latents.sample_size)
    vae = load_vae({"tiny": tiny, "kl": kl}[kind])
    with torch.no_grad():
        mean, std = posterior(vae, pixels.clean(indices, flips))
    assert latents.samples_posterior == (std is not None)
    expected = mean if std is None else mean + std * noise
    actual = latents.clean(indices, flips, noise if std is not None else None)
    actual = actual * latents.std.view(-1, 1, 1) + latents.mean.view(-1, 1, 1)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=2e-3)  # fp16


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_training_latents_have_mean_0_and_deviation_1(kind, caches):
    data = load_training_data(as_latents(caches[kind]))
    indices = torch.arange(len(data)).repeat(2)
    flips = torch.arange(2).repeat_interleave(len(data)).bool()
    shape = (len(indices), data.channels, data.sample_size, data.sample_size)
    # Noise of exactly unit square: what it adds is the posterior's variance itself.
    noises = (torch.ones(shape), -torch.ones(shape)) if data.samples_posterior else (None,)
    x = torch.cat([data.clean(indices, flips, noise) for noise in noises]).double()
    torch.testing.assert_close(
        x.mean((0, 2, 3)), torch.zeros(data.channels).double(), atol=1e-4, rtol=0
    )
    deviation = x.std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), atol=1e-4, rtol=0)


def test_batches_with_a_posterior_are_a_function_of_the_step(caches, tmp_path):
    config = short_run(as_latents(caches["kl"]), tmp_path)
    data = load_training_data(config.data)
    single = StepBatches(data, config, 0, 1)[2]
    parts = [StepBatches(pickle.loads(pickle.dumps(data)), config, rank, 2)[2] for rank in (0, 1)]
    for name, value in single.items():
        assert torch.equal(value[0::2], parts[0][name])
        assert torch.equal(value[1::2], parts[1][name])
    data.samples_posterior = False
    at_the_mean = StepBatches(data, config, 0, 1)[2]
    assert torch.equal(at_the_mean["timestep"], single["timestep"])
    assert not torch.equal(at_the_mean["x"], single["x"])


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["tiny", "kl"])
@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction"])
def test_a_batch_has_the_same_bits_where_the_latents_are_on_a_device(
    prediction, kind, device, caches, tmp_path
):
    """What is random is drawn on the CPU; a device gathers and mixes."""
    config = short_run(as_latents(caches[kind]), tmp_path)
    config.objective.prediction_type = prediction
    config.model.token_drop_rate = 0.5
    data = load_training_data(config.data)
    copied = data.copied_to(torch.device(device))
    assert (data.on_device, copied.on_device) == (False, True)
    there, here = StepBatches(copied, config, 1, 2), StepBatches(data, config, 1, 2)
    for step, batch in enumerate(step_loader(there, range(3), torch.device(device))):
        assert batch.keys() == here[step].keys()
        for name, value in here[step].items():
            assert batch[name].device.type == device
            assert torch.equal(batch[name].cpu(), value), name
    assert step == 2
    sizes = [x.numel() for name, x in copied._copies.items() if name.startswith("latents")]
    assert copied.nbytes == 2 * sum(sizes)


def test_latents_go_to_a_device_that_has_room_for_them(caches, monkeypatch):
    """A device that is there in name only: half of its free memory is the limit."""
    data, device = load_training_data(as_latents(caches["tiny"])), torch.device("cuda")
    gone_to = []
    monkeypatch.setattr(type(data), "copied_to", lambda self, where: gone_to.append(where))
    for free in (2 * data.nbytes - 2, 2 * data.nbytes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where, free=free: (free, free))
        on_training_device(data, device)
    assert gone_to == [device]
    assert on_training_device(data, torch.device("cpu")) is data


def test_other_programs_can_read_the_parts(caches):
    files = [str(path) for path in sorted((caches["kl"] / "parts").iterdir())]
    rows = datasets.load_dataset("arrow", data_files=files, split="train")
    assert len(rows) == IMAGES
    assert rows.features["label_label"].names == ["Cubism", "Fauvism"]
    assert len(rows[0]["latents"]) == len(rows[0]["latents_std"]) == 2 * 4 * 8 * 8


def test_interrupted_encoding_continues_where_it_stopped(source, caches, tmp_path, monkeypatch):
    calls, last = [], 8  # a probe, six for the first part of ten pictures, and one more

    def stops_in_the_second_part(vae, images):
        calls.append(len(images))
        if len(calls) == last:
            raise KeyboardInterrupt
        return posterior(vae, images)

    monkeypatch.setattr(encode_module, "posterior", stops_in_the_second_part)
    with pytest.raises(KeyboardInterrupt):
        encode(source, tmp_path / "cache", batch_size=4, part_size=10)
    with pytest.raises(UserError, match="incomplete: 1 of 3 parts are written"):
        load_training_data(as_latents(tmp_path / "cache"))
    with pytest.raises(UserError, match="incomplete"):
        train(short_run(as_latents(tmp_path / "cache"), tmp_path / "run"))
    calls, last = [], None
    encode(source, tmp_path / "cache", batch_size=4, part_size=10)
    assert sum(calls) == 1 + 2 * (IMAGES - 10)
    assert bytes_of(tmp_path / "cache") == bytes_of(caches["tiny"])


def test_the_remains_of_a_killed_encoding_are_removed(source, caches, copied):
    (copied / "cache.json").unlink()
    (copied / "parts" / "part-00001.arrow").unlink()
    names = [".part-00001.arrow.3f.complexity-partial", ".part-00001.arrow.partial.x1.arrow"]
    for name in names:
        (copied / "parts" / name).touch()
    (copied / "parts" / ".mine").touch()
    encode(source, copied, batch_size=4, part_size=10)
    assert bytes_of(copied) == bytes_of(caches["tiny"]) | {".mine": b""}


def test_two_encodings_do_not_write_to_one_folder(source, copied):
    changed = dataclasses.replace(source, holdout=0.5)
    with locked_elsewhere(copied), pytest.raises(UserError, match="is being written by"):
        encode(changed, copied, part_size=10)


def test_a_complete_cache_may_be_read_only(source, copied):
    with mock.patch.object(encode_module, "claim_folder", side_effect=AssertionError):
        encode(source, copied, part_size=10)


def test_a_complete_cache_is_not_encoded_again(source, copied, monkeypatch):
    monkeypatch.setattr(encode_module, "_write_parts", lambda *_: pytest.fail("encoded again"))
    before = bytes_of(copied)
    encode(source, copied, part_size=10)
    assert bytes_of(copied) == before
    # Another hold-out changes only the statistics.
    encode(dataclasses.replace(source, holdout=0.5), copied, part_size=10)
    changed = {name for name, value in bytes_of(copied).items() if value != before[name]}
    assert changed == {"cache.json"}
    with pytest.raises(UserError, match=r"holdout is 0.25, and .* was made with 0.5"):
        load_training_data(as_latents(copied))
    assert len(load_training_data(dataclasses.replace(as_latents(copied), holdout=0.5))) > 0


REPORTED = """
from complexity_dit import __main__ as cli
from complexity_dit.data import encode
encode_rows = encode._encode_rows
def report(rows, *rest):
    print(f"from row {rows.start}", flush=True)
    return encode_rows(rows, *rest)
encode._encode_rows = report
cli.main()
"""


@pytest.mark.slow
def test_two_processes_write_the_cache_that_one_writes(source, caches, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(REPORTED)
    done = torchrun(
        2, script, "encode", "--source", source.source, "--vae", source.vae,
        "--resolution", "16", "--holdout", "0.25", "--out", tmp_path / "cache",
        "--part_size", "10", "--batch_size", "4",
    )  # fmt: skip
    assert bytes_of(tmp_path / "cache") == bytes_of(caches["tiny"])
    begun = re.findall(r"from row (\d+)", done.stdout)
    assert sorted(begun) == ["0", "10", "20"]  # each by one of the processes


def test_removed_pictures_are_named_in_training_and_refused_in_encoding(
    paintings, tiny, tmp_path, caplog
):
    folder = Path(shutil.copytree(paintings, tmp_path / "paintings"))
    source = pictures(folder, tiny)
    encode(source, tmp_path / "cache", batch_size=4, part_size=10)
    load_training_data(as_latents(tmp_path / "cache"))
    assert "no longer in" not in caplog.text
    (folder / "Cubism" / "01.png").unlink()
    data = load_training_data(as_latents(tmp_path / "cache"), "all")
    assert len(data) == IMAGES
    assert "1 of the 24 pictures that were encoded" in caplog.text
    assert "01.png" in caplog.text
    with pytest.raises(UserError, match=r"had 24 usable images .* has 23 now"):
        encode(source, tmp_path / "cache", batch_size=4, part_size=10)
    Image.new("RGB", (16, 16)).save(folder / "Cubism" / "01.png")
    with pytest.raises(UserError, match="source_fingerprint"):
        encode(source, tmp_path / "cache", batch_size=4, part_size=10)


def test_another_vae_is_refused(source, copied, kl, tmp_path):
    other = TinyAutoencoder.from_pretrained(source.vae)
    with torch.no_grad():
        other.encoder[0].bias += 1e-3
    other.save_pretrained(tmp_path / "other")
    for vae in (kl, str(tmp_path / "other")):
        config = dataclasses.replace(as_latents(copied), vae=vae)
        with pytest.raises(UserError, match="did not make the latents"):
            train(short_run(config, tmp_path / "run"))
        with pytest.raises(UserError, match="was begun with vae"):
            encode(dataclasses.replace(source, vae=vae), copied, part_size=10)
    assert not (tmp_path / "run").exists()


def test_vae_that_moved_is_named(source, tiny, kl, paintings, tmp_path):
    moved = Path(shutil.copytree(tiny, tmp_path / "here"))
    cache = encode(pictures(paintings, str(moved)), tmp_path / "cache", part_size=10)
    moved.rename(tmp_path / "there")
    with pytest.raises(UserError, match=r"here.*set data.vae to where it is now"):
        open_latent_space(as_latents(cache))
    config = dataclasses.replace(as_latents(cache), vae=str(tmp_path / "there"))
    assert isinstance(open_latent_space(config).vae, TinyAutoencoder)


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("bias", torch.inf, r"encodes .*png .* NaN, infinite"),
        ("weight", 0.0, r"channels \[2\] of the latents are the same"),
    ],
)
def test_vae_with_unusable_latents_is_refused(parameter, value, message, source, tmp_path):
    broken = TinyAutoencoder.from_pretrained(source.vae)
    with torch.no_grad():
        getattr(broken.encoder[-1], parameter)[2] = value
    broken.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=message):
        encode(dataclasses.replace(source, vae=str(tmp_path / "vae")), tmp_path / "cache")
    assert not (tmp_path / "cache" / "cache.json").exists()
    assert bool(list((tmp_path / "cache").rglob("*.arrow"))) == (parameter == "weight")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_the_cache_stops_the_training_and_names_the_picture(value, copied, tmp_path):
    path = part_path(copied, 0)
    row = datasets.Dataset.from_file(str(path))[4]
    good = np.asarray(row["latents"], dtype=np.float16)
    bad = good.copy()
    bad[7] = value
    content = path.read_bytes()
    assert content.count(good.tobytes()) == 1
    path.write_bytes(content.replace(good.tobytes(), bad.tobytes()))
    config = dataclasses.replace(as_latents(copied), holdout=0.25)
    data = load_training_data(config, "all")
    data.clean([3], torch.tensor([False]))
    name = Path(row["name"].split(" ")[0]).name
    with pytest.raises(UserError, match=rf"{name}.*\(row 4 of .*\) is not finite"):
        data.copied_to(torch.device("cpu"))
    with pytest.raises(UserError, match=rf"{name}.*\(row 4 of .*\) is not finite"):
        data.clean([3, 4], torch.tensor([False, False]))


def test_damaged_parts_are_named(source, copied, caches):
    part = part_path(copied, 1)
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"part-00001.arrow should hold 10 of the 24 pictures"):
        load_training_data(as_latents(copied))
    part.write_bytes(part_path(copied, 2).read_bytes())
    with pytest.raises(UserError, match="it holds 4"):
        load_training_data(as_latents(copied))
    part.unlink()
    with pytest.raises(UserError, match="it is not there"):
        load_training_data(as_latents(copied))
    # What the message says to do.
    (copied / "cache.json").unlink()
    encode(source, copied, batch_size=4, part_size=10)
    assert bytes_of(copied) == bytes_of(caches["tiny"])


def test_parts_that_are_not_as_the_cache_says(copied):
    good = json.loads((copied / "cache.json").read_text())
    statistics = good["statistics"] | {"mean": [0.0] * 2, "std": [1.0] * 2}
    for other, message in (
        ({"label_names": {"style": ["a"]}}, "column 'label_style' is absent, expected int64"),
        ({"label_names": {"label": ["one"]}}, "label_label is outside of -1 to 0"),
        ({"has_std": True}, "column 'latents_std' is absent"),
        (
            {"shape": [2, 1, 1], "statistics": statistics},
            "'latents' is .*192\\], expected .*4\\]",
        ),
    ):
        (copied / "cache.json").write_text(json.dumps(good | other))
        with pytest.raises(UserError, match=rf"does not match .*cache\.json: .*{message}"):
            load_training_data(as_latents(copied))
    # What `source` leaves out has its default.
    (copied / "cache.json").write_text(json.dumps(good | {"source": {}}))
    load_training_data(as_latents(copied))


def test_settings_that_do_not_match_the_cache_are_refused(copied, source, tmp_path):
    config = as_latents(copied)
    cases = [
        (dataclasses.replace(config, resolution=32), "resolution is 32, and .* with 16"),
        (dataclasses.replace(config, label_fields=["style"]), "label field 'style' is not in"),
        (dataclasses.replace(config, source=f"latents:{tmp_path}/none"), "not a folder of latents"),
        (dataclasses.replace(config, source="art", vae="x"), "goes with source latents:PATH"),
    ]
    for case, message in cases:
        with pytest.raises(UserError, match=message):
            load_training_data(case)
    with pytest.raises(UserError, match="latents:PATH is for training only"):
        load_data(config, "heldout")
    info = json.loads((copied / "cache.json").read_text())
    (copied / "cache.json").write_text(json.dumps(info | {"format": "complexity-dit-latents-0"}))
    with pytest.raises(UserError, match="has the format"):
        load_training_data(config)
    (copied / "cache.json").write_text("half of")
    with pytest.raises(UserError, match=r"cannot read .*cache.json"):
        load_training_data(config)


def test_cache_without_mirror_images(source, tmp_path):
    plain = dataclasses.replace(source, flip=False)
    cache = encode(plain, tmp_path / "cache", batch_size=8)
    with pytest.raises(UserError, match="has no mirrored latents"):
        load_training_data(as_latents(cache))
    data = load_training_data(dataclasses.replace(as_latents(cache), flip=False))
    assert data.clean([0, 1], torch.tensor([False, False])).shape == (2, 6, 4, 4)
    with pytest.raises(UserError, match="no mirrored latents"):
        data.clean([0], torch.tensor([True]))


def test_latents_of_bf16_are_rounded_and_not_mixed_with_others(source, caches, tmp_path):
    rounded = encode(source, tmp_path / "cache", batch_size=4, part_size=10, mixed_precision="bf16")
    flips = torch.zeros(8, dtype=torch.bool)
    exact, found = (
        load_training_data(as_latents(cache)).clean(range(8), flips)
        for cache in (caches["tiny"], rounded)
    )
    assert 0 < (found - exact).std() < 0.05 * exact.std()
    with pytest.raises(UserError, match=r"begun with mixed_precision bf16 \(now no\)"):
        encode(source, rounded, batch_size=4, part_size=10)


def test_a_label_field_may_have_any_printable_name(tiny, tmp_path):
    fields = ["type", "keys", "generator", "height", "latents", "sha256", "a.b", "é x", "self"]
    folder = tmp_path / "paintings"
    folder.mkdir()
    lines = [",".join(["file_name", *fields])]
    for i in range(6):
        Image.new("RGB", (16, 16), (i, 40 * i, 0)).save(folder / f"{i}.png")
        lines.append(",".join([f"{i}.png", *("pq"[i % 2] for _ in fields)]))
    (folder / "metadata.csv").write_text("\n".join(lines))
    encode(pictures(folder, tiny), tmp_path / "cache")
    assert list(load_training_data(as_latents(tmp_path / "cache")).label_names) == fields
    (folder / "metadata.csv").write_text("\n".join(lines).replace("a.b", "a\tb"))
    with pytest.raises(UserError, match=r"'a\\tb' has no printable name"):
        encode(pictures(folder, tiny), tmp_path / "other")


def test_bad_settings_of_encode_are_refused(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    cases = [
        (dataclasses.replace(source, vae=None), "new", "--vae is missing"),
        (dataclasses.replace(source, resolution=10), "new", "must be a multiple of 4"),
        (source, "mine", "is not one that this command has written"),
    ]
    for config, out, message in cases:
        with pytest.raises(UserError, match=message):
            encode(config, tmp_path / out)
    with pytest.raises(UserError, match="at least 1"):
        encode(source, tmp_path / "new", part_size=0)
    with pytest.raises(UserError, match="mixed_precision 'fp16' must be no or bf16"):
        encode(source, tmp_path / "new", mixed_precision="fp16")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious.txt"]
    assert not (tmp_path / "new").exists()


def test_statistics_without_a_vae_are_refused(pipe):
    with pytest.raises(UserError, match="latents_mean and latents_std go together"):
        ComplexityDiTPipeline(
            pipe.transformer, pipe.scheduler, None, pipe.id2label, [0.0] * 3, [1.0] * 3
        )
