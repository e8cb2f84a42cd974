"""Guidance away from the null rows or a weaker network, inside an interval; other image sizes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from complexity_dit.__main__ import PROGRAM
from complexity_dit.cli.inspect import inspect
from complexity_dit.config import EvalSampleConfig, ObjectiveConfig, SampleConfig
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.image_to_image import ComplexityDiTImg2ImgPipeline
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import iter_samples, sample, scheduler_settings
from complexity_dit.training.objective import build_scheduler
from inl_core.run.errors import UserError

QUICK = SampleConfig(num_inference_steps=2, batch_size=8, chunk_size=4, guidance_scale=2.5)


def generator():
    return torch.Generator().manual_seed(0)


def latents_of(pipe, **kwargs):
    settings = {"num_inference_steps": 3, "output_type": "latent", "style": 1, "genre": 0}
    return pipe(**(settings | {"generator": generator()} | kwargs)).images


@pytest.fixture
def guide(pipe) -> ComplexityDiTTransformer2DModel:
    """A smaller network for the same labels."""
    torch.manual_seed(1)
    config = {**pipe.transformer.config, "num_layers": 1, "hidden_size": 16}
    weak = ComplexityDiTTransformer2DModel.from_config(config).eval()
    for p in weak.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return weak


def test_autoguidance_leads_away_from_the_guide_under_the_same_labels(pipe, guide):
    seen = []
    guide.register_forward_hook(
        lambda _, args, output: seen.append((args[2].tolist(), output[0])), with_kwargs=False
    )
    noise = torch.randn(1, 3, 8, 8, generator=generator())
    out = latents_of(pipe, guide=guide, guidance_scale=3.0, num_inference_steps=1)
    labels, weak = seen[0]
    assert labels == [[1, 0]]  # not the null rows
    with torch.no_grad():
        strong = pipe.transformer(noise, torch.tensor(1000.0), torch.tensor([[1, 0]])).sample
    # One Euler step from noise level 1 to 0.
    torch.testing.assert_close(out, noise - (weak + 3.0 * (strong - weak)))


def test_scale_one_is_the_network_alone_and_zero_the_guide(pipe, guide):
    alone = latents_of(pipe, guidance_scale=1.0)
    assert torch.equal(latents_of(pipe, guide=guide, guidance_scale=1.0), alone)
    assert torch.equal(
        latents_of(pipe, guide=guide, guidance_scale=2.0, guidance_interval=(0.0, 0.01)), alone
    )
    weak_pipe = ComplexityDiTPipeline(guide, pipe.scheduler, id2label=pipe.id2label)
    weak_pipe.set_progress_bar_config(disable=True)
    weak = latents_of(weak_pipe, guidance_scale=1.0)
    torch.testing.assert_close(latents_of(pipe, guide=guide, guidance_scale=0.0), weak)
    torch.testing.assert_close(latents_of(pipe, guide=pipe.transformer, guidance_scale=4.0), alone)
    assert not torch.allclose(latents_of(pipe, guide=guide, guidance_scale=3.0), alone)


@pytest.fixture
def early(pipe) -> ComplexityDiTPipeline:
    """The pipeline with an auxiliary output after the first of its two blocks."""
    cls = ComplexityDiTTransformer2DModel
    network = cls.from_config(pipe.transformer.config, auxiliary_layer=1).eval()
    network.load_state_dict(pipe.transformer.state_dict(), strict=False)
    for name, p in network.named_parameters():
        if "_aux" in name:
            torch.nn.init.normal_(p, std=0.1)
    made = ComplexityDiTPipeline(network, pipe.scheduler, id2label=pipe.id2label)
    made.set_progress_bar_config(disable=True)
    return made


def test_internal_guidance_leads_away_from_the_auxiliary_output(pipe, early, guide):
    noise = torch.randn(1, 3, 8, 8, generator=generator())
    time, labels = torch.tensor(1000.0), torch.tensor([[1, 0]])
    with torch.no_grad():
        strong, auxiliary = early.transformer(
            noise, time, labels, return_dict=False, return_auxiliary=True
        )
        null = early.transformer(noise, time, torch.tensor([[-1, -1]])).sample
        weak = guide(noise, time, labels).sample

    def after_one_step(**kwargs):
        return latents_of(early, internal_guidance_scale=2.5, num_inference_steps=1, **kwargs)

    alone = after_one_step(guidance_scale=1.0)
    torch.testing.assert_close(alone, noise - (auxiliary + 2.5 * (strong - auxiliary)))
    assert early.num_evaluations == 1
    # With other guidance the two steps are added.
    step = 1.5 * (strong - auxiliary)
    torch.testing.assert_close(
        after_one_step(guidance_scale=3.0), noise - (null + 3.0 * (strong - null) + step)
    )
    assert early.num_evaluations == 2
    torch.testing.assert_close(
        after_one_step(guidance_scale=3.0, guide=guide),
        noise - (weak + 3.0 * (strong - weak) + step),
    )
    # Outside of the interval, and at scale 1, the pictures are those of the network without it.
    for off in ({"internal_guidance_scale": 1.0}, {"guidance_interval": (0.0, 0.01)}):
        settings = {"internal_guidance_scale": 2.5, "guidance_scale": 1.0} | off
        assert torch.equal(latents_of(early, **settings), latents_of(pipe, guidance_scale=1.0))


def test_internal_guidance_of_a_network_without_the_output_is_refused(pipe):
    with pytest.raises(UserError, match=r"internal_guidance_scale 2.0 .* has none.*auxiliary_la"):
        latents_of(pipe, internal_guidance_scale=2.0)
    assert latents_of(pipe, internal_guidance_scale=1.0).isfinite().all()


def test_internal_guidance_from_the_command_line(early, tmp_path, command):
    early.save_pretrained(tmp_path / "pipe")
    calls = {
        "plain": {}, "one": {"internal_guidance_scale": 1}, "two": {"internal_guidance_scale": 2},
        "chunks": {"internal_guidance_scale": 2, "batch_size": 1},
    }  # fmt: skip
    found, kept = {}, {}
    for name, options in calls.items():
        words = [word for k, v in options.items() for word in (f"--{k}", v)]
        status, _, error = command(
            "sample", tmp_path / "pipe", "--out", tmp_path / name, "--num_images", 3,
            "--num_inference_steps", 2, "--chunk_size", 2, *words,
        )  # fmt: skip
        assert status == 0, error
        files = sorted((tmp_path / name).glob("*.png"))
        found[name] = [np.asarray(Image.open(file)).tolist() for file in files]
        kept[name] = json.loads((tmp_path / name / "settings.json").read_text())
    assert len(found["two"]) == 3
    assert found["two"] == found["chunks"] != found["plain"] == found["one"]
    assert kept["two"]["sample.internal_guidance_scale"] == 2
    # A folder that an older version began can be completed.
    assert kept["plain"] == kept["one"]
    assert "sample.internal_guidance_scale" not in kept["plain"]


RECOMMENDED = {
    "guidance_scale": 1.0,
    "internal_guidance_scale": 2.5,
    "guidance_interval": (0.8, 1.0),
}  # fmt: skip  -- of three steps at 1, 0.91 and 0.71, two are guided


def test_a_pipeline_carries_its_own_guidance(early, tmp_path, command):
    usual = latents_of(early, guidance_scale=2.0)
    assert torch.equal(latents_of(early), usual)  # what a pipeline without its own does
    early.guidance = RECOMMENDED
    early.save_pretrained(tmp_path / "pipe")
    pipe = ComplexityDiTPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    own = latents_of(pipe)
    assert torch.equal(own, latents_of(pipe, **RECOMMENDED))
    assert pipe.num_evaluations == 3
    assert not torch.allclose(own, usual, atol=1e-3)
    everywhere = RECOMMENDED | {"guidance_interval": (0.0, 1.0)}
    given = latents_of(pipe, guidance_interval=(0.0, 1.0))  # the scales are still its own
    assert torch.equal(given, latents_of(pipe, **everywhere))
    assert not torch.allclose(given, own, atol=1e-3)
    copies = ComplexityDiTImg2ImgPipeline.from_pipe(pipe).guidance, inspect(str(tmp_path / "pipe"))
    assert copies[0]["internal_guidance_scale"] == 2.5
    assert copies[1]["guidance"]["internal_guidance_scale"] == 2.5
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert "guidance 1, internal guidance 2.5 at noise levels 0.8 to 1" in card

    words = ("sample", tmp_path / "pipe", "--num_images", 1, "--num_inference_steps", 1)
    for out, options, scale in (("own", (), 2.5), ("off", ("--internal_guidance_scale", 1), None)):
        status, _, error = command(*words, "--out", tmp_path / out, *options)
        assert status == 0, error
        kept = json.loads((tmp_path / out / "settings.json").read_text())
        assert kept["sample.guidance_scale"] == 1.0
        assert kept["sample.guidance_interval"] == [0.8, 1.0]
        assert kept.get("sample.internal_guidance_scale") == scale
        assert kept["network_evaluations"] == 1

    assert scheduler_settings(pipe, EvalSampleConfig())["network_evaluations"] == 20
    early.guidance = None
    assert torch.equal(latents_of(early), usual)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"guidance_interval": [0.6, 0.3]}, "must satisfy 0 <= low <= high <= 1"),
        ({"guidance_interval": 0.3}, "two numbers, and the two ends of an interval"),
        ({"guidance_scale": "2"}, "two numbers, and the two ends"),
        ({"guidance_scale": float("inf")}, "two numbers, and the two ends"),
        ({"scale": 2.0}, "must have some of guidance_scale, internal_guidance_scale"),
        ({"internal_guidance_scale": 2.0}, "this network has none"),
    ],
)
def test_a_wrong_guidance_of_a_pipeline_is_refused(pipe, tmp_path, wrong, words):
    with pytest.raises(UserError, match=words):
        pipe.guidance = wrong
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"guidance": wrong}))
    with pytest.raises(UserError, match=words):
        ComplexityDiTPipeline.from_pretrained(tmp_path)


def test_a_guide_of_other_data_is_refused(pipe, guide):
    config = {**guide.config, "num_classes": [3, 5]}
    other = ComplexityDiTTransformer2DModel.from_config(config)
    with pytest.raises(UserError, match=r"num_classes \[3, 5\].*\[3, 2\]"):
        latents_of(pipe, guide=other)


def test_the_sample_command_loads_a_guide_and_refuses_a_wrong_one(pipe, guide, tmp_path):
    names, scheduler = pipe.id2label, pipe.scheduler
    pipe.save_pretrained(tmp_path / "strong")
    ComplexityDiTPipeline(guide, scheduler, id2label=names).save_pretrained(tmp_path / "weak")
    labels = pipe.get_label_ids(style=[0, 1, 2], genre=0)
    config = replace(QUICK, autoguidance=str(tmp_path / "weak"))

    def images_of(config):
        batches = iter_samples(pipe, labels, config, progress=False)
        return np.concatenate([images for _, images in batches])

    guided = images_of(config)
    assert not np.array_equal(guided, images_of(QUICK))
    assert np.array_equal(guided, images_of(replace(config, batch_size=1)))
    sample(str(tmp_path / "strong"), str(tmp_path / "set.npz"), 3,
           {"style": ["0", "1", "2"], "genre": ["0"]}, config)  # fmt: skip
    assert np.array_equal(np.load(tmp_path / "set.npz")["arr_0"], guided)

    epsilon = build_scheduler(ObjectiveConfig(prediction_type="epsilon"))
    ComplexityDiTPipeline(guide, epsilon, id2label=names).save_pretrained(tmp_path / "eps")
    with pytest.raises(UserError, match="predicts epsilon and the pipeline flow"):
        images_of(replace(QUICK, autoguidance=str(tmp_path / "eps")))
    renamed = {**names, "genre": {0: "still life", 1: "portrait"}}
    ComplexityDiTPipeline(guide, scheduler, id2label=renamed).save_pretrained(tmp_path / "names")
    with pytest.raises(UserError, match="other labels"):
        images_of(replace(QUICK, autoguidance=str(tmp_path / "names")))
    with pytest.raises(UserError, match="not a pipeline folder"):
        images_of(replace(QUICK, autoguidance=str(tmp_path / "nothing")))


def test_the_options_of_the_command():
    _, (parsed, *_), _ = PROGRAM.parse(
        ["sample", "pipe", "--out", "x", "--scheduler", "UniPCMultistepScheduler", "--shift", "3",
         "--autoguidance", "weak", "--guidance_interval", "[0.2, 0.8]", "--height", "64",
         "--width", "128"]
    )  # fmt: skip
    assert (parsed.scheduler, parsed.shift, parsed.autoguidance) == (
        "UniPCMultistepScheduler", 3.0, "weak",
    )  # fmt: skip
    assert tuple(parsed.guidance_interval) == (0.2, 0.8)
    assert (parsed.height, parsed.width) == (64, 128)


def test_the_guidance_interval_is_closed(pipe):
    # Levels of four Euler steps at shift 1: 1, 0.75, 0.5, 0.25.
    pipe.scheduler = build_scheduler(ObjectiveConfig(sampling_shift=1.0))
    plain = latents_of(pipe, guidance_scale=1.0, num_inference_steps=4)

    def inside(low, high):
        picture = latents_of(
            pipe, guidance_scale=3.0, guidance_interval=(low, high), num_inference_steps=4
        )
        return pipe.num_evaluations - 4, not torch.equal(picture, plain)

    assert inside(0.0, 0.2) == (0, False)
    assert inside(0.25, 0.5) == (2, True)
    assert inside(0.6, 0.7) == (0, False)
    assert inside(1.0, 1.0) == (1, True)
    assert inside(0.0, 1.0) == (4, True)


def test_a_model_without_labels_is_evaluated_once_per_step(pipe):
    config = {**pipe.transformer.config, "label_fields": [], "num_classes": []}
    network = ComplexityDiTTransformer2DModel.from_config(config).eval()
    plain = ComplexityDiTPipeline(network, pipe.scheduler)
    settings = {"num_inference_steps": 4, "output_type": "latent"}
    pictures = [
        plain(generator=generator(), guidance_scale=scale, **settings).images
        for scale in (1.0, 3.0)
    ]
    assert torch.equal(*pictures)
    assert plain.num_evaluations == 4
    assert scheduler_settings(plain, replace(QUICK, num_inference_steps=4)) == (
        scheduler_settings(plain, replace(QUICK, num_inference_steps=4, guidance_scale=1.0))
    )


def test_sizes_that_are_not_square(pipe, tmp_path):
    labels = pipe.get_label_ids(style=[0, 1, 2, 0, 1], genre=1)

    def images_of(**changes):
        batches = iter_samples(pipe, labels, replace(QUICK, **changes), progress=False)
        return np.concatenate([images for _, images in batches])

    wide = images_of(width=16)
    assert wide.shape == (5, 8, 16, 3)
    assert np.array_equal(wide, images_of(width=16, batch_size=2))
    assert images_of(height=16).shape == (5, 16, 8, 3)
    # Rows and columns differ: the transposed input does not give the transposed image.
    noise = torch.randn(1, 3, 8, 16, generator=generator())
    lying = latents_of(pipe, height=8, width=16, latents=noise)
    standing = latents_of(pipe, height=16, width=8, latents=noise.mT.contiguous())
    assert lying.shape == standing.mT.shape
    assert not torch.allclose(lying, standing.mT, atol=1e-3)
    pipe.save_pretrained(tmp_path / "pipe")
    sample(str(tmp_path / "pipe"), str(tmp_path / "wide"), 2, sampling=replace(QUICK, width=16))
    with pytest.raises(UserError, match=r"height 8 and width 15 must be positive multiples of 2"):
        latents_of(pipe, height=8, width=15)
