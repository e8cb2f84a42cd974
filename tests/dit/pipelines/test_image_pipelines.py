"""Image-to-image, inpainting and interpolation as a user of diffusers calls them."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from PIL import Image

from complexity_dit import (
    ComplexityDiTImg2ImgPipeline,
    ComplexityDiTInpaintPipeline,
    ComplexityDiTPipeline,
    interpolate,
)
from complexity_dit.pipelines.image_to_image import slerp
from inl_core.run.errors import UserError
from support.networks import generators, small_vae

SCHEDULERS = [
    None,
    FlowMatchHeunDiscreteScheduler,
    lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    DDIMScheduler,
    EulerDiscreteScheduler,
]
NUMPY_2 = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # diffusers builds arrays from tensors
)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def mask() -> Image.Image:
    """White in the right half."""
    return Image.fromarray(np.repeat([[0] * 4 + [255] * 4], 8, axis=0).astype(np.uint8))


@pytest.fixture
def img2img(pipe):
    return quiet(ComplexityDiTImg2ImgPipeline.from_pipe(pipe))


@pytest.fixture
def inpaint(pipe):
    return quiet(ComplexityDiTInpaintPipeline.from_pipe(pipe))


def with_vae(pipe, cls=ComplexityDiTPipeline, **statistics):
    vae = small_vae(scaling_factor=0.5)
    return quiet(cls(pipe.transformer, pipe.scheduler, vae, pipe.id2label, **statistics))


def with_scheduler(pipe, scheduler):
    """The pipeline of a network for that scheduler; None is the one that it has."""
    if scheduler is None:
        return pipe
    return quiet(type(pipe)(pipe.transformer, scheduler(), id2label=pipe.id2label))


def array(image):
    return np.asarray(image, dtype=np.float32) / 255


def shifted(pipe, level):
    shift = pipe.scheduler.config.shift
    return shift * level / (1 + (shift - 1) * level)


def settings(**changes):
    return {"num_inference_steps": 4, "output_type": "np", "generator": generators(0)} | changes


@NUMPY_2
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_strength_from_the_input_to_a_new_image(pipe, img2img, picture, scheduler):
    pipe, img2img = (with_scheduler(one, scheduler) for one in (pipe, img2img))
    found = img2img(picture, strength=0.0, style=1, **settings()).images[0]
    np.testing.assert_allclose(found, array(picture), atol=1e-6)
    assert img2img.num_evaluations == 0
    # At 1 the bits are those of the pipeline without an image, for the same noise.
    new = img2img(picture, strength=1.0, style=1, **settings()).images
    assert np.array_equal(new, pipe(style=1, **settings()).images)
    steps = img2img.num_timesteps
    # In between, the distance to the input grows with the strength.
    distances = [
        np.abs(
            img2img(picture, strength=s, style=1, **settings()).images[0] - array(picture)
        ).mean()
        for s in (0.01, 0.5, 1.0)
    ]
    assert 0 < distances[0] < distances[1] < distances[2]
    img2img(picture, strength=0.5, **settings())
    assert img2img.num_timesteps == (3 if steps == 7 else 2)  # Heun: 2 of 4 steps, the last single


def test_noise_is_added_at_the_level_passed_to_the_network(img2img, picture):
    # The network's input is exactly (1 - t) x + t noise for its timestep t.
    seen = []
    img2img.transformer.register_forward_pre_hook(
        lambda module, args: seen.append((args[0].clone(), float(args[1]) / 1000))
    )
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    img2img(picture, strength=0.5, guidance_scale=1.0, latents=noise, num_inference_steps=4)
    clean = torch.from_numpy(array(picture) * 2 - 1).permute(2, 0, 1)[None]
    x, t = seen[0]
    assert t == pytest.approx(shifted(img2img, 0.5))
    torch.testing.assert_close(x, (1 - t) * clean + t * noise)


@pytest.mark.parametrize(
    "statistics", [{}, {"latents_mean": [0.1, 0.2, -0.3], "latents_std": [0.5, 2.0, 1.5]}]
)
def test_images_are_encoded_with_the_scaling_of_the_vae(pipe, statistics):
    pipeline = with_vae(pipe, ComplexityDiTImg2ImgPipeline, **statistics)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean
        through = (pipeline.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    found = pipeline(pixels, strength=0.0, output_type="pt").images
    torch.testing.assert_close(found, through, rtol=1e-4, atol=1e-5)
    latents = pipeline(pixels, strength=0.0, output_type="latent").images
    if statistics:
        shape = (1, 3, 1, 1)
        expected = (mean - torch.tensor(statistics["latents_mean"]).view(shape)) / torch.tensor(
            statistics["latents_std"]
        ).view(shape)
    else:
        expected = mean * 0.5
    torch.testing.assert_close(latents, expected)


@pytest.mark.parametrize("cls", [ComplexityDiTImg2ImgPipeline, ComplexityDiTInpaintPipeline])
def test_an_image_does_not_depend_on_its_batch(pipe, picture, mask, cls):
    pipeline = with_vae(pipe, cls)
    other = Image.fromarray(255 - np.asarray(picture))
    pictures = [p.resize((16, 16)) for p in (other, picture)]
    extra = {"mask_image": mask} if cls is ComplexityDiTInpaintPipeline else {}
    both = pipeline(
        pictures, strength=0.7, style=["Cubism", "Fauvism"], chunk_size=2,
        **extra, **settings(generator=generators(5, 6)),
    ).images  # fmt: skip
    alone = pipeline(
        pictures[1], strength=0.7, style="Fauvism", chunk_size=2, chunk_offset=1,
        **extra, **settings(generator=generators(6)),
    ).images  # fmt: skip
    assert np.array_equal(both[1:], alone)
    assert not np.array_equal(both[0], both[1])


def test_one_image_with_many_labels_and_many_images_with_one(img2img, picture):
    one = img2img(picture, style=["Cubism", "Fauvism"], num_images_per_prompt=2, strength=0.5,
                  **settings(generator=generators(1, 2, 3, 4))).images  # fmt: skip
    many = img2img([picture] * 2, style="Fauvism", num_images_per_prompt=2, strength=0.5,
                   **settings(generator=generators(1, 2, 3, 4))).images  # fmt: skip
    assert one.shape == many.shape == (4, 8, 8, 3)
    np.testing.assert_allclose(one[2:], many[2:], atol=1e-5)
    assert np.abs(one[:2] - many[:2]).max() > 1e-3


@NUMPY_2
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_black_is_kept_and_white_is_regenerated(inpaint, picture, mask, scheduler):
    inpaint = with_scheduler(inpaint, scheduler)
    for strength in (1.0, 0.5):
        found = inpaint(picture, mask, strength=strength, style=1, **settings()).images[0]
        np.testing.assert_allclose(found[:, :4], array(picture)[:, :4], atol=1e-6)
        assert np.abs(found[:, 4:] - array(picture)[:, 4:]).min(axis=-1).mean() > 0.01
    as_bytes = inpaint(picture, mask, **settings(output_type="pil")).images[0]
    assert np.array_equal(np.asarray(as_bytes)[:, :4], np.asarray(picture)[:, :4])


def test_an_all_white_and_an_all_black_mask(pipe, inpaint, picture):
    white, black = (Image.new("L", (8, 8), shade) for shade in (255, 0))
    new = inpaint(picture, white, style=1, **settings()).images
    assert np.array_equal(new, pipe(style=1, **settings()).images)
    np.testing.assert_allclose(
        inpaint(picture, black, style=1, **settings()).images[0], array(picture), atol=1e-6
    )


def test_the_kept_part_is_at_the_noise_level_of_each_step(inpaint, picture, mask):
    seen = []
    inpaint.transformer.register_forward_pre_hook(
        lambda module, args: seen.append((args[0].clone(), float(args[1]) / 1000))
    )
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    inpaint(picture, mask, guidance_scale=1.0, latents=noise, num_inference_steps=4)
    clean = torch.from_numpy(array(picture) * 2 - 1).permute(2, 0, 1)[None]
    assert [t for _, t in seen] == pytest.approx(
        [shifted(inpaint, level) for level in (1.0, 0.75, 0.5, 0.25)]
    )
    for x, t in seen:
        expected = (1 - t) * clean + t * noise
        torch.testing.assert_close(x[..., :4], expected[..., :4])


def test_inpainting_latents_keeps_black_latents_and_pixels(pipe, mask):
    pipeline = with_vae(pipe, ComplexityDiTInpaintPipeline)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    # One column of the left half: its latents are regenerated, their black pixels are kept.
    wide = torch.zeros(16, 16)
    wide[:, 7:] = 1
    latents = pipeline(pixels, wide, style=1, **settings(output_type="latent")).images
    with torch.no_grad():
        clean = pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean * 0.5
    torch.testing.assert_close(latents[..., :3], clean[..., :3])
    assert (latents[..., 3] - clean[..., 3]).abs().min() > 1e-4
    images = pipeline(pixels, wide, style=1, **settings(output_type="pt")).images
    torch.testing.assert_close(images[..., :7], pixels[..., :7], rtol=0, atol=1e-6)
    assert (images[..., 7:] - pixels[..., 7:]).abs().mean() > 0.01


def test_each_pipeline_loads_the_folders_of_the_others(pipe, inpaint, picture, mask, tmp_path):
    pipe.save_pretrained(tmp_path / "plain")
    loaded = quiet(ComplexityDiTInpaintPipeline.from_pretrained(tmp_path / "plain"))
    expected = inpaint(picture, mask, style="Cubism", **settings()).images
    assert np.array_equal(loaded(picture, mask, style="Cubism", **settings()).images, expected)
    # A folder records the class that saved it.
    loaded.save_pretrained(tmp_path / "inpaint")
    again = DiffusionPipeline.from_pretrained(tmp_path / "inpaint", trust_remote_code=True)
    assert type(again) is ComplexityDiTInpaintPipeline
    assert np.array_equal(
        quiet(again)(picture, mask, style="Cubism", **settings()).images, expected
    )
    back = ComplexityDiTPipeline.from_pipe(again)
    assert back.transformer is again.transformer
    assert back.id2label == pipe.id2label


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strength": 1.2}, r"strength 1.2 must be from 0"),
        ({"strength": float("nan")}, "strength nan"),
        ({"image": "cat.png"}, "image is str: pass a PIL image"),
        ({"image": []}, "image is empty list"),
        ({"image": torch.rand(1, 4, 8, 8)}, "4 channels, expected 3"),
        ({"image": torch.rand(1, 3, 8, 8) * 255}, "outside \\[0, 1\\]"),
        ({"image": torch.rand(1, 3, 9, 8)}, "height 9 and width 8 must be positive multiples of 2"),
        ({"image": [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 6))]}, "several sizes"),
        ({"image": [Image.new("RGB", (8, 8))] * 2, "style": [0, 1, 2]}, "3 labels|2 images"),
        ({"generator": generators(0, 1)}, "2 generators for 1 images"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents of shape \(1, 3, 4, 4\) must be"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"style": "Cubsm"}, "near: 'Cubism'"),
    ],
)
def test_wrong_input_is_refused(img2img, inpaint, picture, mask, changes, words):
    image = changes.pop("image", picture) if "image" in changes else picture
    for one in (lambda **k: img2img(image, **k), lambda **k: inpaint(image, mask, **k)):
        with pytest.raises(UserError, match=words):
            one(**changes)


def test_wrong_masks_are_refused(inpaint, picture):
    with pytest.raises(UserError, match="3 channels, expected 1"):
        inpaint(picture, torch.ones(1, 3, 8, 8))
    with pytest.raises(UserError, match="2 masks for 1 images"):
        inpaint(picture, torch.ones(2, 8, 8))
    with pytest.raises(UserError, match="mask_image is NoneType"):
        inpaint(picture, None)


def test_every_form_of_an_image_and_of_a_mask_is_read_alike(inpaint, picture, mask):
    pixels, shade = array(picture), array(mask)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = inpaint(picture, mask, style=1, **settings()).images
    for image in ([picture], pixels, pixels[None], [pixels], tensor, tensor[None], [tensor]):
        found = inpaint(image, mask, style=1, **settings()).images
        np.testing.assert_allclose(found, expected, atol=1e-6)
    grey = torch.from_numpy(shade)
    for other in (shade, shade[None], shade[..., None], grey, grey[None], grey[None, None], [grey]):
        found = inpaint(picture, other, style=1, **settings()).images
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_height_and_width_resize_the_image(img2img, picture):
    large = img2img(picture, strength=0.0, height=12, width=16, output_type="np").images
    assert large.shape == (1, 12, 16, 3)


def test_slerp_keeps_the_standard_deviation_of_noise():
    first, last = (torch.randn(4096, generator=g) for g in generators(0, 1))
    assert torch.equal(slerp(first, last, 0.0), first)
    assert torch.equal(slerp(first, last, 1.0), last)
    assert float(slerp(first, last, 0.5).std()) == pytest.approx(1, abs=0.03)
    assert torch.equal(slerp(first, first, 0.3), first)


def test_interpolation_goes_from_one_image_to_another_without_a_jump(pipe):
    ends = ({"style": "Cubism"}, {"style": "Ukiyo e", "genre": "portrait"})
    shared = {"num_inference_steps": 3, "output_type": "np", "chunk_size": 1}
    strip = interpolate(pipe, *ends, count=5, seeds=(3, 4), **shared)
    assert strip.shape == (5, 8, 8, 3)
    for picture, labels, seed in ((strip[0], ends[0], 3), (strip[-1], ends[1], 4)):
        alone = pipe(**labels, generator=generators(seed), **shared).images[0]
        np.testing.assert_allclose(picture, alone, atol=1e-5)
    steps = np.abs(np.diff(strip, axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < np.abs(strip[0] - strip[-1]).mean()
    assert steps.min() > 0
    same = interpolate(pipe, {"style": 1}, count=2, **shared)
    assert np.array_equal(same[0], same[1])


def test_wrong_interpolations_are_refused(pipe):
    for changes, words in (
        ({"count": 1}, "count 1 must be at least 2"),
        ({"generator": None}, "generator is determined"),
        ({"return_dict": False}, "return_dict"),
        ({"first": {"style": "Cubsm"}}, "near"),
    ):
        with pytest.raises(UserError, match=words):
            interpolate(pipe, **changes)


def test_label_embeds_replace_label_ids(pipe):
    embeds = pipe.get_label_embeds(style=["Cubism", None], genre="portrait")
    assert embeds.shape == (2, 32)
    shared = settings(generator=generators(0, 1))
    by_name = pipe(style=["Cubism", None], genre="portrait", **shared).images
    shared = settings(generator=generators(0, 1))
    np.testing.assert_allclose(pipe(label_embeds=embeds, **shared).images, by_name, atol=1e-6)
    with pytest.raises(UserError, match="give label_embeds or style, not both"):
        pipe(label_embeds=embeds, style=0)
    with pytest.raises(UserError, match=r"must be \(B, 32\)"):
        pipe(label_embeds=embeds[:, :5])
    with pytest.raises(UserError, match="mean nothing to a guide"):
        pipe(label_embeds=embeds, guide=pipe.transformer)
    with pytest.raises(ValueError, match="not both"):
        pipe.transformer(torch.zeros(1, 3, 8, 8), torch.tensor([1.0]), torch.zeros(1, 2),
                         label_embeds=embeds)  # fmt: skip
