"""`complexity-dit autoencoder`: bits of a resumed run, its losses, its folder and its users."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from complexity_dit.cli.inspect import inspect
from complexity_dit.config import (
    AutoencoderModelConfig,
    DataConfig,
    EMAConfig,
    OptimConfig,
    TrainConfig,
)
from complexity_dit.data.dataset import load_data
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.models.vae import load_vae
from complexity_dit.training.autoencoder import adversarial_weight, train_autoencoder
from complexity_dit.training.batches import PictureBatches
from complexity_dit.training.critic import AutoencoderAndCritic, edge_loss, hinge_loss
from complexity_dit.training.train import train
from inl_core.run.errors import RunStopped, UserError
from support.outcomes import last_checkpoint, outcome, rows_of
from support.processes import ENVIRONMENT, python, torchrun
from support.small_runs import AUTOENCODER, autoencoder_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(out.parent / "cache"))
        train_autoencoder(autoencoder_run(out, keep_last=0))
    return out


@pytest.mark.parametrize("step", [4, 6])  # where the critic begins, and with its moments
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(tmp_path, step):
    config = autoencoder_run(
        tmp_path / "straight", keep_last=0, checkpoint_every=2, evaluate_num_images=0
    )
    train_autoencoder(config)
    stopped = tmp_path / "stopped"
    shutil.copytree(config.out, stopped)
    for checkpoint in (stopped / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    train_autoencoder(dataclasses.replace(config, out=str(stopped), resume="auto"))
    assert outcome(stopped) == outcome(config.out)
    for name in ("losses.csv", "heldout_log.csv"):
        assert (stopped / name).read_bytes() == (Path(config.out) / name).read_bytes()
    assert [row["critic"] != "" for row in rows_of(stopped / "losses.csv")] == 4 * [False] + 4 * [
        True
    ]


def test_the_critic_starts_late_and_rises(tmp_path):
    config = autoencoder_run(tmp_path, steps=1000, adversarial_weight=0.4)
    weights = [adversarial_weight(step, config) for step in (0, 499, 500, 524, 549, 999)]
    assert weights == pytest.approx([0, 0, 0.4 / 50, 0.2, 0.4, 0.4])
    assert adversarial_weight(999, dataclasses.replace(config, adversarial_weight=0.0)) == 0


def test_the_run_learns_and_its_files_say_so(trained):
    losses = [float(row["loss"]) for row in rows_of(trained)]
    assert losses[-1] < losses[0]
    parts = rows_of(trained / "losses.csv")
    for loss, row in zip(losses, parts, strict=True):
        assert loss == pytest.approx(float(row["l1"]) + float(row["edges"]), rel=1e-5)
    assert float(parts[-1]["scale"]) > 0
    assert [row["step"] for row in rows_of(trained / "heldout_log.csv")] == ["4", "8"]
    assert (trained / "samples" / "step-00000008.png").is_file()
    with Image.open(trained / "reconstructions.png") as strip:
        assert strip.size[0] > 7 * 16  # seven pictures are held out
    result = json.loads((trained / "result.json").read_text())
    assert result["metrics"].keys() >= {"psnr", "fd_random"}
    assert "fid" not in result["metrics"]
    assert result["metrics"]["psnr"] == pytest.approx(
        float(rows_of(trained / "heldout_log.csv")[-1]["psnr"]), abs=1e-6
    )
    assert result["settings"]["extractor"]["weights_sha256"] == result["weights_sha256"]
    assert 1 <= result["latents"]["effective_rank"] <= 4
    assert len(result["latents"]["spectrum"]) == 4


def test_the_scale_is_that_of_the_training_latents(trained):
    vae = TinyAutoencoder.from_pretrained(trained, subfolder="vae")
    data = DataConfig(**json.loads((trained / "vae" / "data.json").read_text()))
    images = load_data(data, "train")
    pixels = images.clean(range(len(images)), torch.zeros(len(images), dtype=torch.bool))
    with torch.no_grad():
        z = (vae.encode(pixels).latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert float(z.mean()) == pytest.approx(0, abs=1e-4)
    assert float(z.std()) == pytest.approx(1, abs=1e-3)


def test_inspect_and_vae_know_the_run_its_checkpoint_and_the_folder(trained):
    newest = last_checkpoint(trained)
    shown = [inspect(str(path)) for path in (trained, trained / "vae", newest)]
    assert len({one["weights_sha256"] for one in shown}) == 1
    assert shown[0]["factor"] == 4
    assert shown[0]["measures"]["psnr"] > 0
    assert shown[2]["measures"] is None
    assert shown[0]["trained_on"]["source"] == "art"
    yaml.safe_dump(shown)
    for path in (trained, newest):
        assert isinstance(load_vae(str(path)), TinyAutoencoder)


def test_a_pipeline_of_its_latents_is_whole(trained, command, tmp_path, weights_cache):
    run = tmp_path / "dit"
    for words in (
        ["encode", "--source=art", "--num_images=64", "--resolution=16", "--holdout=0.2",
         f"--vae={trained}", f"--out={tmp_path / 'latents'}"],
        ["train", f"--data.source=latents:{tmp_path / 'latents'}", "--data.resolution=16",
         "--data.holdout=0.2", "--steps=2", "--batch_size=4", "--model.patch_size=2",
         "--model.overrides={hidden_size: 32, num_layers: 2, num_attention_heads: 2}",
         f"--out={run}", "--report_to=none", "--mixed_precision=no"],
        ["sample", run, f"--out={tmp_path / 'grid.png'}", "--num_images=2",
         "--num_inference_steps=2"],
        ["evaluate", run, "--reference=art", f"--out={tmp_path / 'evaluation'}", "--num_images=4",
         "--weights=random", "--sample.num_inference_steps=2", "--floors=true",
         "--measures=[fid]", "--report=false"],
    ):  # fmt: skip
        status, _, error = command(*words)
        assert status == 0, error
    metrics = json.loads((tmp_path / "evaluation" / "result.json").read_text())["metrics"]
    assert metrics["fd_random_vae"] > 0
    pipe = DiffusionPipeline.from_pretrained(run / "pipeline", trust_remote_code=True)
    assert isinstance(pipe.vae, TinyAutoencoder)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    image = pipe(num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (16, 16)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": DataConfig(resolution=15)}, "data.resolution 15 must be a multiple of 4"),
        ({"crop_size": 11}, "crop_size 11 must be a multiple of 4"),
        ({"data": DataConfig(resolution=16, holdout=0.0)}, "split 'heldout' of art is empty"),
        ({"resume": "auto", "seed": 1}, "give --seed 0, or"),
        ({"resume": "auto", "critic_channels": 8}, "give --critic_channels 4, or"),
    ],
)
def test_a_run_that_cannot_be_is_refused(trained, tmp_path, settings, words):
    out = trained if "resume" in settings else tmp_path / "new"
    with pytest.raises(UserError, match=words):
        train_autoencoder(autoencoder_run(out, **settings))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AutoencoderModelConfig(latent_channels=0), "latent_channels is 0"),
        (lambda: AutoencoderModelConfig(block_out_channels=[8, 0]), "block_out_channels is"),
        (
            lambda: autoencoder_run("x", crop_size=32),
            "crop_size 32 is larger than",
        ),
        (lambda: autoencoder_run("x", optim=OptimConfig(name="muon")), "is trained with adamw"),
        (
            lambda: autoencoder_run("x", data=DataConfig(vae="y")),
            "has no use for data.vae y",
        ),
        (lambda: autoencoder_run("x", ema=EMAConfig(snapshot_every=1)), "ema.snapshot_every 1"),
        (lambda: autoencoder_run("x", adversarial_start=2.0), "adversarial_start is 2.0"),
        (lambda: autoencoder_run("x", critic_layers=0), "critic_layers is 0"),
        (lambda: autoencoder_run("x", edge_weight=math.nan), "edge_weight is nan"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_lists_of_unequal_length_are_refused(tmp_path):
    model = AutoencoderModelConfig(block_out_channels=[8, 8])
    with pytest.raises(UserError, match="must be of one length"):
        train_autoencoder(autoencoder_run(tmp_path / "run", model=model))


def test_folders_without_pictures_and_of_others_are_refused(trained, command, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ["autoencoder", f"--out={tmp_path / 'run'}", "--steps=1"]
    for source, message in (
        (f"imagefolder:{tmp_path / 'empty'}", "there are no images in"),
        (f"imagefolder:{tmp_path / 'none'}", "is not a folder"),
        ("latents:x", "must be art, imagefolder:PATH or hub:NAME"),
    ):
        status, _, error = command(*words, f"--source={source}")
        assert (status, error.strip().count("\n")) == (2, 0), error
        assert message in error
    with pytest.raises(UserError, match="is of a complexity-dit-autoencoder"):
        train(TrainConfig(out=str(trained), resume="auto"))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "too small to be sharded"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "this run can have no or bf16"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_refused(name, value, words, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=words):
        train_autoencoder(autoencoder_run(tmp_path / "run", mixed_precision="auto"))


def test_a_signal_saves_and_stops(tmp_path, monkeypatch):
    config = autoencoder_run(tmp_path / "run", evaluate_num_images=0, heldout_every=0)
    make = PictureBatches.__getitem__

    def item(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(self, step)

    monkeypatch.setattr(PictureBatches, "__getitem__", item)
    with pytest.raises(RunStopped, match="after step 3 of 8"):
        train_autoencoder(config)
    assert last_checkpoint(config.out).name == "step-00000003"


def test_a_death_in_the_middle_of_saving_leaves_the_checkpoint_before(tmp_path):
    """Killed after the averaged weights of the second checkpoint, before its others."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from complexity_dit.training import state\n"
        "from support.small_runs import autoencoder_run\n"
        "from complexity_dit.training.autoencoder import train_autoencoder\n"
        "save, count = state.save_file, 0\n"
        "def killing(*arguments):\n"
        "    global count\n"
        "    save(*arguments)\n"
        "    count += 1\n"
        "    if count == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "state.save_file = killing\n"
        "train_autoencoder(autoencoder_run(sys.argv[1], evaluate_num_images=0))\n"
    )
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, script, out], env=os.environ | ENVIRONMENT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert list((out / "checkpoints").glob(".step-00000008.*"))
    config = autoencoder_run(out, evaluate_num_images=0)
    train_autoencoder(dataclasses.replace(config, resume="auto"))
    straight = dataclasses.replace(config, out=str(tmp_path / "straight"))
    train_autoencoder(straight)
    assert outcome(out) == outcome(straight.out)
    assert not list((out / "checkpoints").glob(".*"))


WORKER = """
import sys
from complexity_dit.training.autoencoder import train_autoencoder
from support.small_runs import autoencoder_run

train_autoencoder(autoencoder_run(sys.argv[1], steps=int(sys.argv[2]), resume="auto", keep_last=0))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_resume_exactly_and_match_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(2, tmp_path / "worker.py", tmp_path / "straight", 8)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000008")
    torchrun(2, tmp_path / "worker.py", tmp_path / "stopped", 8)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "straight")
    python(tmp_path / "worker.py", tmp_path / "one", 8)
    for row, other in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "straight"), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)


def test_crops_are_parts_of_the_picture_and_depend_on_the_step_alone(tmp_path):
    config = autoencoder_run(tmp_path, data=DataConfig(resolution=16, num_images=64, flip=False))
    data = load_data(config.data, "train")
    whole = PictureBatches(data, config, 0, 1)
    assert len(whole) == config.steps
    pixels = whole[3]["pixels"]
    assert pixels.shape == (4, 3, 12, 12)
    assert torch.equal(pixels, whole[3]["pixels"])
    assert not torch.equal(pixels, whole[4]["pixels"])
    halves = [PictureBatches(data, config, rank, 2)[3]["pixels"] for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), pixels)
    images = data.clean(range(len(data)), torch.zeros(len(data), dtype=torch.bool))
    parts = images.unfold(2, 12, 1).unfold(3, 12, 1)  # (N, 3, 5, 5, 12, 12)
    for part in pixels:
        assert (parts == part[None, :, None, None]).all(-1).all(-1).all(1).any()


def test_losses_of_known_pictures():
    x, y = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
    y[0, 0, 0, 0] = 1  # part of one of the 4 differences across, and of one of the 3 down
    assert float(edge_loss(x, y)) == pytest.approx(1 / 4 + 1 / 3)
    zero = torch.zeros(2)
    assert float(hinge_loss(zero, zero)) == 2
    assert float(hinge_loss(zero + 1, zero - 1)) == 0


def test_the_critic_gives_gradients_to_pictures_and_to_its_own_loss_only():
    torch.manual_seed(0)
    network = AutoencoderAndCritic(settings=AUTOENCODER, critic_channels=4, critic_layers=2)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    seen = images.clone().requires_grad_()
    network.judge(seen).mean().backward()
    assert seen.grad is not None
    assert all(p.grad is None for p in network.parameters())
    _, logits = network(images, True)
    hinge_loss(*logits).backward()
    assert all(p.grad is None for p in network.autoencoder.parameters())
    assert all(p.grad is not None for p in network.critic.parameters())
    # One picture's logits do not depend on the others.
    torch.testing.assert_close(network.judge(images)[:1], network.judge(images[:1]))
