"""What the gallery samples: checked settings, images step by step, PNGs that hold their settings.

No widgets here. The images are a function of the settings and the pipeline's weights: image i of a
grid has the noise that `complexity-dit sample` gives image i of the same seed, and all images of a
strip over labels have the noise of image 0, so that only the label differs.
"""

import base64
import contextlib
import copy
import io
import json
import queue
import shlex
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from complexity_dit.config import Limits
from complexity_dit.grids import draw_grid
from complexity_dit.labels import MISSING
from complexity_dit.models.text import checked_prompt
from complexity_dit.pictures import read_picture
from complexity_dit.pipelines.image_to_image import (
    ComplexityDiTImg2ImgPipeline,
    ComplexityDiTInpaintPipeline,
)
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline, NetworkBatches
from complexity_dit.pipelines.sampling import drawn_labels, pipeline_hash, to_uint8
from complexity_dit.pipelines.schedulers import (
    named_scheduler,
    prediction_type,
    scheduler_names,
)
from complexity_dit.pipelines.starts import Between, built_as
from complexity_dit.seeding import generator_for, uniform
from inl_core.run.errors import UserError
from inl_core.run.json_files import one_line

MAX_SEED = 2**32 - 1
"""Short enough to type; JavaScript represents integers exactly up to 2^53."""

MAX_PROMPT = 2000
"""Characters; a text encoder reads fewer."""

PREVIEW_SECONDS = 0.2
"""Least time between two previews, each of which costs a decoding."""

PNG = b"\x89PNG\r\n\x1a\n"

CHUNK = "complexity-dit"
"""Keyword of the text chunk of a PNG: JSON with settings, picture (index of the image; null for a
sheet), pipeline_sha256 and versions."""


@dataclass(frozen=True)
class Settings:
    """Everything that the images depend on besides the pipeline."""

    labels: dict[str, str] = field(default_factory=dict)
    """Names by label field; those of the other fields are of training pictures that have these."""

    prompt: str = ""
    """Text, for a pipeline with a text encoder; the other fields are then left open."""

    strip: str | None = None
    """Label field of a strip, one image for each of its names from the same noise; None: a grid."""

    to_labels: dict[str, str] | None = None
    """Labels of the last image of a strip that leads there from `labels`; None: another form."""

    to_seed: int | None = None
    """Seed of the noise of that image; None is `seed`."""

    image: str | None = None
    """A PNG in base64 to start from; None: noise."""

    mask: str | None = None
    """A PNG in base64 whose white is painted anew and whose black is kept; None: everything."""

    strength: float = 0.6
    """With an image, the share of the steps to run."""

    seed: int = 0
    """The noise of image i comes from (seed, i), as in `complexity-dit sample`."""

    num_images: int = 4
    """Images of a grid; a strip has as many as its field has names."""

    num_inference_steps: int = 20
    """Denoising steps."""

    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is off. None is the pipeline's own."""

    internal_guidance_scale: float | None = None
    """Guidance away from the network's auxiliary output, likewise."""

    scheduler: str | None = None
    """Class name in diffusers; None is the pipeline's own."""

    side: int | None = None
    """Height and width in pixels; None is the size of training."""

    chunk_size: int = 4
    """Images per network call; the bits depend on it, as in `complexity-dit sample`."""


@dataclass(frozen=True)
class Frame:
    """The images after some of the steps."""

    step: int
    """Steps done."""

    steps: int
    """Steps in all."""

    images: NDArray[np.uint8]
    """(N, Y, X, 3): the clean pictures that the network predicts, at the end the samples."""

    @property
    def done(self) -> bool:
        return self.step == self.steps


class Gallery:
    """A pipeline and the limits of a request.

    Args:
        pipe: The pipeline, on the device that samples.
        limits: The most that one request may ask for.
    """

    def __init__(self, pipe: ComplexityDiTPipeline, limits: Limits | None = None) -> None:
        self.pipe = pipe
        self.limits = limits or Limits()
        self.label_names = pipe.label_names
        self.pipeline_sha256 = pipeline_hash(pipe)
        self._sampling = threading.Lock()  # two samplings must not share the machine

    @property
    def own_scheduler(self) -> str:
        """Class name of the scheduler that was saved with the pipeline."""
        return type(self.pipe.scheduler).__name__

    @property
    def schedulers(self) -> list[str]:
        """Class names of the deterministic schedulers that fit the model, its own first."""
        own, predicts = self.own_scheduler, prediction_type(self.pipe.scheduler)
        fitting = scheduler_names(predicts, deterministic=True)
        return [own, *(name for name in fitting if name != own)]

    def captions(self, settings: Settings) -> list[str]:
        """The line under each image: its name in a strip, its number in a grid."""
        if settings.strip is not None:
            return [one_line(name.replace("_", " ")) for name in self.label_names[settings.strip]]
        return [f"{i + 1}" for i in range(settings.num_images)]

    def labels_of(self, seed: int) -> dict[str, str]:
        """The labels that the first image of a seed has if none are asked for, by field."""
        nothing = torch.full((1, len(self.label_names)), MISSING)
        row = drawn_labels(self.pipe, nothing, seed)[0].tolist()
        fields = zip(row, self.label_names.items(), strict=True)
        return {field: names[i] for i, (field, names) in fields if i != MISSING}

    def check(self, settings: Settings) -> Settings:
        """Check that settings are valid and within the limits.

        Returns:
            The settings with scheduler, side and guidance filled in and, for a strip, without a
            label of its own field.

        Raises:
            UserError: Naming the value, what was expected and what to do.
        """
        limits, multiple = self.limits, self.pipe.transformer.config.patch_size
        multiple *= self.pipe.vae_scale_factor
        side = self.pipe.sample_size if settings.side is None else settings.side
        scheduler = settings.scheduler or self.own_scheduler
        own, scale = self.pipe.guidance, settings.guidance_scale
        scale = own["guidance_scale"] if scale is None else scale
        internal = settings.internal_guidance_scale
        internal = own["internal_guidance_scale"] if internal is None else internal
        for name, value, low, high, limit in (
            ("seed", settings.seed, 0, MAX_SEED, ""),
            ("last seed", settings.to_seed or 0, 0, MAX_SEED, ""),
            ("strength", settings.strength, 0, 1, ""),
            ("number of pictures", settings.num_images, 1, limits.max_images, "max_images"),
            ("number of steps", settings.num_inference_steps, 1, limits.max_steps, "max_steps"),
            ("size", side, multiple, limits.max_side, "max_side"),
            ("chunk_size", settings.chunk_size, 1, limits.max_images, ""),
            ("guidance", scale, 0, limits.max_guidance, ""),
            ("internal guidance", internal, 0, limits.max_guidance, ""),
        ):
            is_scale = name.endswith("guidance") or name == "strength"
            kinds = (int, float) if is_scale else (int,)
            if type(value) not in kinds or not low <= value <= high:  # NaN is refused too
                kind = "a number" if is_scale else "a whole number"
                option = f" (--{limit} of the command)" if limit else ""
                raise UserError(f"{name} {value!r} must be {kind} from {low} to {high}{option}")
        if side % multiple:
            lower = side - side % multiple
            raise UserError(
                f"size {side} must be a multiple of {multiple}: take {lower} or {lower + multiple}"
            )
        if scheduler not in self.schedulers:
            raise UserError(f"scheduler {scheduler!r} must be one of {', '.join(self.schedulers)}")
        self.pipe.get_label_ids(settings.labels)
        self.pipe.get_label_ids(settings.to_labels or {})
        prompt = checked_prompt(settings.prompt)
        if len(prompt) > MAX_PROMPT:
            raise UserError(f"the prompt has {len(prompt)} characters: take at most {MAX_PROMPT}")
        if prompt and self.pipe.text_encoder is None:
            raise UserError(self.pipe.no_prompts(prompt))
        forms = (settings.strip, settings.to_labels, settings.image)
        if sum(form is not None for form in forms) > 1:
            raise UserError("strip, to_labels and image exclude each other: give one of them")
        if settings.mask is not None and settings.image is None:
            raise UserError("a mask needs an image")
        pictures = {
            name: self._fitted(name, text, side)
            for name, text in (("image", settings.image), ("mask", settings.mask))
            if text is not None
        }
        if settings.strip is not None:
            if settings.strip not in self.label_names:
                names = ", ".join(self.label_names) or "none"
                raise UserError(f"strip {settings.strip!r} must be a label field: {names}")
            count = len(self.label_names[settings.strip])
            if count > limits.max_images:
                raise UserError(
                    f"a strip over {settings.strip} has {count} pictures, and this gallery paints "
                    f"at most {limits.max_images} at once: paint a grid, or start it with "
                    f"--max_images {count}"
                )
        labels = {name: v for name, v in settings.labels.items() if name != settings.strip}
        return replace(
            settings, labels=labels, prompt=prompt, scheduler=scheduler, side=side,
            guidance_scale=scale, internal_guidance_scale=internal, **pictures,
        )  # fmt: skip

    def _fitted(self, name: str, text: str, side: int) -> str:
        """A PNG in base64, checked and cut to a square of `side` pixels."""
        if not text:
            raise UserError(f"there is no {name} yet: choose one")
        try:
            data = base64.b64decode(text, validate=True)
            if data[:8] != PNG or max(struct.unpack(">II", data[16:24])) > self.limits.max_side:
                raise ValueError(f"expected a PNG of at most {self.limits.max_side} px")
            picture = read_picture(data)
        except (UserError, ValueError, struct.error) as error:
            raise UserError(f"the {name} cannot be read ({error}): choose another") from error
        if picture.size != (side, side):
            picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, format="PNG")
        return base64.b64encode(file.getvalue()).decode()

    def paint(self, settings: Settings) -> Iterator[Frame]:
        """Sample, with previews on the way.

        Sampling runs in its own thread and never waits for the caller, who gets the newest preview.
        Closing the iterator returns at once and ends the sampling after its current step.

        Args:
            settings: What to sample.

        Yields:
            Frames, the last of which is `done`.

        Raises:
            UserError: If the settings are refused, or the images are not finite.
        """
        settings, stop = self.check(settings), threading.Event()
        newest: queue.Queue[Frame | Exception] = queue.Queue(maxsize=1)

        def show(item: Frame | Exception) -> None:
            with contextlib.suppress(queue.Empty):
                newest.get_nowait()  # an older frame that was not fetched
            newest.put_nowait(item)

        def work() -> None:
            try:
                with self._sampling:
                    show(self._paint(settings, stop, show))
            except Exception as error:  # raised again in the caller's thread
                show(error)

        threading.Thread(target=work, name="painter", daemon=True).start()
        try:
            while True:
                item = newest.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.done:
                    return
        finally:
            stop.set()

    def _paint(self, settings: Settings, stop: threading.Event, show: Any) -> Frame:
        cls, arguments = self._start(settings)
        pipe = built_as(cls, self.pipe)  # with an interrupt, scheduler and progress bar of its own
        pipe.set_progress_bar_config(disable=True)
        if settings.scheduler == self.own_scheduler:
            pipe.scheduler = copy.deepcopy(self.pipe.scheduler)
        else:
            pipe.scheduler = named_scheduler(self.pipe.scheduler, settings.scheduler)
        steps, last_preview = settings.num_inference_steps, 0.0

        def after_step(running: Any, call: int, _: Tensor, tensors: dict) -> dict:
            nonlocal last_preview
            running._interrupt = stop.is_set()
            is_last = call + 1 == running.num_timesteps
            if not is_last and time.monotonic() - last_preview >= PREVIEW_SECONDS:
                x = tensors["pred_original_sample"].to(running.transformer.dtype)
                pixels = running._decode(x, NetworkBatches(settings.chunk_size, 0))
                images = running.image_processor.postprocess(pixels, output_type="np")
                # A second-order scheduler makes two calls per step.
                step = (call + 1) * steps // running.num_timesteps
                show(Frame(min(step, steps - 1), steps, to_uint8(np.nan_to_num(images))))
                last_preview = time.monotonic()
            return {}

        images = pipe(
            **arguments,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            internal_guidance_scale=settings.internal_guidance_scale,
            height=settings.side,
            width=settings.side,
            chunk_size=settings.chunk_size,
            output_type="np",
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["pred_original_sample"],
        ).images
        if not np.isfinite(images).all():
            raise UserError(
                f"the pictures hold values that are not finite; lower the guidance "
                f"({settings.guidance_scale:g}), or check the pipeline's weights"
            )
        return Frame(steps, steps, to_uint8(images))

    def _start(self, settings: Settings) -> tuple[type[ComplexityDiTPipeline], dict[str, Any]]:
        """The class of the pipeline, and its arguments for labels, noise and picture."""
        row, count = self.pipe.get_label_ids(settings.labels), settings.num_images
        text = {"prompt": settings.prompt} if settings.prompt else {}

        def drawn(rows: Tensor, seed: int) -> Tensor:
            return rows if text else drawn_labels(self.pipe, rows, seed)

        if settings.to_labels is not None:
            last = self.pipe.get_label_ids(settings.to_labels)
            seeds = settings.seed, settings.seed if settings.to_seed is None else settings.to_seed
            side = settings.side or self.pipe.sample_size
            ends = [drawn(*end) for end in zip((row, last), seeds, strict=True)]
            way = Between(torch.cat(ends), seeds, count, (side, side))
            return way.pipeline, way.arguments(self.pipe, range(count)) | text
        noise, cls, more = list(range(count)), type(self.pipe), text
        if settings.strip is not None:
            names = self.label_names[settings.strip]
            rows, noise = row.repeat(len(names), 1), [0] * len(names)
            rows[:, list(self.label_names).index(settings.strip)] = torch.arange(len(names))
            same = [uniform(settings.seed, "labels", 0)] * len(names)
            labels = rows if text else self.pipe.fill_labels(rows, same)
        elif settings.image is not None:
            labels, cls = row.repeat(count, 1), ComplexityDiTImg2ImgPipeline
            more = text | {"image": _picture(settings.image), "strength": settings.strength}
            if settings.mask is not None:
                cls = ComplexityDiTInpaintPipeline
                more["mask_image"] = _picture(settings.mask)
        else:
            labels = drawn(row.repeat(count, 1), settings.seed)
        generators = [generator_for(settings.seed, "sample", i) for i in noise]
        return cls, {"class_labels": labels, "generator": generators, **more}


def _picture(text: str) -> Image.Image:
    return read_picture(base64.b64decode(text))


def picture_png(
    gallery: Gallery, settings: Settings, image: NDArray[np.uint8], picture: int
) -> bytes:
    """Encode one image, uint8 (Y, X, 3), as a PNG that holds its settings."""
    return _encode(Image.fromarray(image), gallery, settings, picture)


def sheet_png(gallery: Gallery, settings: Settings, images: NDArray[np.uint8]) -> bytes:
    """Encode all images, uint8 (N, Y, X, 3), as one PNG that holds their settings."""
    captions = gallery.captions(settings) if settings.strip is not None else []
    sheet = draw_grid(images, sheet_columns(len(images)), below=captions)
    return _encode(sheet, gallery, settings, None)


def sheet_columns(count: int) -> int:
    """Columns of a sheet that is at least as wide as it is high."""
    return next(columns for columns in range(1, count + 1) if columns * columns >= count)


def sample_command(gallery: Gallery, settings: Settings, pipeline: str = "PIPELINE") -> str | None:
    """The command that samples the images again, bit for bit; None if there is none.

    That is so for a strip over a field, for a picture, and between labels of different fields.
    """
    last = settings.to_labels
    if settings.strip is not None or settings.image is not None:
        return None
    words = ["complexity-dit", "sample", pipeline, "--out", "pictures"]
    if last is not None:
        if last.keys() != settings.labels.keys():
            return None
        words += ["--interpolate", "true"]
        if settings.to_seed is not None:
            words += ["--to_seed", f"{settings.to_seed}"]
    if settings.prompt:
        words += ["--prompt", settings.prompt]
    for name, value in settings.labels.items():
        words += [f"--labels.{name}", value, *([last[name]] if last else [])]
    for name in ("num_images", "seed", "num_inference_steps", "chunk_size"):
        words += [f"--{name}", f"{getattr(settings, name)}"]
    for name in ("guidance_scale", "internal_guidance_scale"):
        if getattr(settings, name) not in (None, gallery.pipe.guidance[name]):
            words += [f"--{name}", f"{getattr(settings, name)}"]
    if settings.scheduler not in (None, gallery.own_scheduler):
        words += ["--scheduler", settings.scheduler]
    if settings.side not in (None, gallery.pipe.sample_size):
        words += ["--height", f"{settings.side}", "--width", f"{settings.side}"]
    return shlex.join(words)


def _encode(image: Image.Image, gallery: Gallery, settings: Settings, picture: int | None) -> bytes:
    about = PngImagePlugin.PngInfo()
    content = {
        "settings": asdict(settings),
        "picture": picture,
        "pipeline_sha256": gallery.pipeline_sha256,
        "versions": {name: version(name) for name in ("complexity-dit", "diffusers", "torch")},
    }
    about.add_text(CHUNK, json.dumps(content))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=about)
    return file.getvalue()
