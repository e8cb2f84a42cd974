"""What the gallery paints: settings that are checked, and pictures that appear step by step.

No widget here. A picture is a function of its settings and the pipeline's weights: picture i of a
grid has the noise that `complexity-dit sample` gives image i of the same seed, and all pictures of
a strip have the noise of image 0, so that only the label differs.
"""

import contextlib
import copy
import io
import json
import math
import queue
import shlex
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torch import Tensor

from complexity_dit.config import Limits
from complexity_dit.data.pictures import bombs_refused
from complexity_dit.grids import draw_grid
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline, NetworkBatches
from complexity_dit.pipelines.sampling import pipeline_hash
from complexity_dit.pipelines.schedulers import FLOW_SCHEDULERS, is_flow, named_scheduler
from complexity_dit.seeding import generator_for
from inl_core.run.errors import UserError
from inl_core.run.json_files import filled, one_line, parse_json

MAX_SEED = 2**32 - 1
"""Browsers hold whole numbers exactly up to 2^53; this is what a person can read aloud."""

PREVIEW_SECONDS = 0.2
"""Least time between two looks at unfinished pictures: looking must not slow the painting."""

# Of diffusers' schedulers for the DDPM objectives those that draw no random number on the way.
_DETERMINISTIC = (
    "DDIMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that the pictures depend on besides the pipeline."""

    labels: dict[str, str] = field(default_factory=dict)
    """A name for each label field that is asked for."""

    strip: str | None = None
    """Label field of a strip, a picture for each of its names from the same noise; None: a grid."""

    seed: int = 0
    """The noise of picture i comes from (seed, i), as in `complexity-dit sample`."""

    num_images: int = 4
    """Pictures of a grid; a strip has as many as its field has names."""

    num_inference_steps: int = 20
    """Denoising steps."""

    guidance_scale: float = 2.0
    """Classifier-free guidance; 1 is off."""

    scheduler: str | None = None
    """Class name in diffusers; None is the pipeline's own."""

    side: int | None = None
    """Height and width in pixels; None is the size of training."""

    chunk_size: int = 4
    """Pictures in a network call, part of the bits as in `complexity-dit sample`."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Settings from `as_dict`; unknown names and values of another type are refused."""
        try:
            return filled(cls, values)
        except ValueError as error:
            raise UserError(f"these are no settings of this version: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Frame:
    """The pictures at one moment."""

    step: int
    """Steps done."""

    steps: int
    """Steps asked for."""

    images: NDArray[np.uint8]
    """(N, Y, X, 3): noise at first, paintings at the end."""

    stopped: bool = False
    """Whether somebody stopped the painting before its end."""

    @property
    def done(self) -> bool:
        return self.step == self.steps and not self.stopped


class Gallery:
    """A pipeline, what can be asked of it, and where that ends.

    Args:
        pipe: The pipeline, on the device that paints.
        limits: The most that one request may ask for.
    """

    def __init__(self, pipe: ComplexityDiTPipeline, limits: Limits | None = None) -> None:
        self.pipe = pipe
        self.limits = limits or Limits()
        self.label_names = pipe.label_names
        self.pipeline_sha256 = pipeline_hash(pipe)

    @property
    def own_scheduler(self) -> str:
        """Class name of the scheduler that was saved with the pipeline."""
        return type(self.pipe.scheduler).__name__

    @property
    def schedulers(self) -> list[str]:
        """Class names that fit the model and draw no random numbers, the pipeline's own first."""
        if is_flow(self.pipe.scheduler):
            fitting = list(FLOW_SCHEDULERS)
        else:
            compatible = {cls.__name__ for cls in self.pipe.scheduler.compatibles}
            fitting = [name for name in _DETERMINISTIC if name in compatible]
        own = self.own_scheduler
        return [own, *(name for name in fitting if name != own)]

    def captions(self, settings: Settings) -> list[str]:
        """A line under each picture: its name in a strip, its number in a grid."""
        if settings.strip is not None:
            return [one_line(name.replace("_", " ")) for name in self.label_names[settings.strip]]
        return [f"{i + 1}" for i in range(settings.num_images)]

    def check(self, settings: Settings) -> Settings:
        """Refuse what cannot be painted or is over a limit.

        Returns:
            The settings with nothing left open: scheduler and side are named, and a strip asks for
            no label of its own field.

        Raises:
            UserError: Naming the value, what was expected and what to do.
        """
        limits, multiple = self.limits, self.pipe.transformer.config.patch_size
        multiple *= self.pipe.vae_scale_factor
        side = self.pipe.sample_size if settings.side is None else settings.side
        scheduler = settings.scheduler or self.own_scheduler
        _whole("seed", settings.seed, 0, MAX_SEED)
        _whole("number of pictures", settings.num_images, 1, limits.max_images, "--max_images")
        _whole("number of steps", settings.num_inference_steps, 1, limits.max_steps, "--max_steps")
        _whole("size", side, multiple, limits.max_side, "--max_side")
        _whole("chunk_size", settings.chunk_size, 1, limits.max_images)
        if side % multiple:
            raise UserError(
                f"size {side} must be a multiple of {multiple}: take {side - side % multiple} or "
                f"{side - side % multiple + multiple}"
            )
        scale = settings.guidance_scale
        if (
            isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not math.isfinite(scale)
        ):
            raise UserError(
                f"guidance {scale!r} must be a number from 0 to {limits.max_guidance:g}"
            )
        if not 0 <= scale <= limits.max_guidance:
            raise UserError(
                f"guidance {scale:g} must be from 0 to {limits.max_guidance:g}; 1 is off, 2 to 4 "
                "are usual"
            )
        if scheduler not in self.schedulers:
            raise UserError(f"scheduler {scheduler!r} must be one of {', '.join(self.schedulers)}")
        self.pipe.get_label_ids(**settings.labels)
        if settings.strip is not None:
            if settings.strip not in self.label_names:
                fields_known = ", ".join(self.label_names) or "none"
                raise UserError(
                    f"a strip over {settings.strip!r}: the label fields are {fields_known}"
                )
            count = len(self.label_names[settings.strip])
            if count > limits.max_images:
                raise UserError(
                    f"a strip over {settings.strip} has {count} pictures, and this gallery paints "
                    f"at most {limits.max_images} at once: paint a grid, or start it with "
                    f"--max_images {count}"
                )
        labels = {name: v for name, v in settings.labels.items() if name != settings.strip}
        return replace(settings, labels=labels, scheduler=scheduler, side=side)

    def paint(self, settings: Settings, stop: threading.Event | None = None) -> Iterator[Frame]:
        """Paint, showing the pictures on the way.

        The painting runs in a thread of its own and never waits for whoever looks: a look that
        comes late sees the newest pictures.

        Args:
            settings: What to paint.
            stop: Set it to end after the current step.

        Yields:
            Frames; the last has `done`, or `stopped` if `stop` was set before the end.

        Raises:
            UserError: The settings are refused, or the pictures are not finite.
        """
        settings, stop = self.check(settings), stop or threading.Event()
        newest: queue.Queue[Frame | Exception] = queue.Queue(maxsize=1)

        def show(item: Frame | Exception) -> None:
            with contextlib.suppress(queue.Empty):
                newest.get_nowait()  # nobody looked: this one is newer
            newest.put_nowait(item)

        def work() -> None:
            try:
                show(self._paint(settings, stop, show))
            except Exception as error:  # whatever it is, it is raised again where it is awaited
                show(error)

        painter = threading.Thread(target=work, name="painter", daemon=True)
        painter.start()
        try:
            while True:
                item = newest.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.done or item.stopped:
                    return
        finally:
            stop.set()  # whoever looked is gone: the next painting must not share the machine
            painter.join()

    def _paint(self, settings: Settings, stop: threading.Event, show: Any) -> Frame:
        pipe = copy.copy(self.pipe)  # its interrupt, scheduler and progress bar are this call's
        pipe.set_progress_bar_config(disable=True)
        if settings.scheduler == self.own_scheduler:
            pipe.scheduler = copy.deepcopy(self.pipe.scheduler)
        else:
            pipe.scheduler = named_scheduler(self.pipe.scheduler, settings.scheduler)
        labels, noise = self._rows(settings)
        steps, done = settings.num_inference_steps, 0
        last_look = 0.0

        def after_step(running: Any, step: int, _: Tensor, tensors: dict) -> dict:
            # A second-order scheduler calls twice a step: the share of calls is what is shown.
            nonlocal last_look, done
            done = (step + 1) * steps // running.num_timesteps
            if stop.is_set():
                running._interrupt = True
            elif (
                time.monotonic() - last_look >= PREVIEW_SECONDS and step + 1 < running.num_timesteps
            ):
                x = tensors["latents"]
                chunks = NetworkBatches(settings.chunk_size, 0)
                pixels = running._decode(x.to(running.transformer.dtype), chunks)
                images = running.image_processor.postprocess(pixels, output_type="np")
                show(Frame(min(done, steps - 1), steps, _to_uint8(np.nan_to_num(images))))
                last_look = time.monotonic()
            return {}

        images = pipe(
            class_labels=labels,
            generator=[generator_for(settings.seed, "sample", i) for i in noise],
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            height=settings.side,
            width=settings.side,
            chunk_size=settings.chunk_size,
            output_type="np",
            callback_on_step_end=after_step,
        ).images
        if not np.isfinite(images).all():
            raise UserError(
                f"the pictures hold values that are not finite; lower the guidance "
                f"({settings.guidance_scale:g}), or look at the pipeline's weights"
            )
        return Frame(done, steps, _to_uint8(images), stopped=pipe.interrupt)

    def _rows(self, settings: Settings) -> tuple[Tensor, list[int]]:
        """Label ids (N, F), and for each picture the number of its noise."""
        row = self.pipe.get_label_ids(**settings.labels)
        if settings.strip is None:
            return row.repeat(settings.num_images, 1), list(range(settings.num_images))
        count = len(self.label_names[settings.strip])
        rows = row.repeat(count, 1)
        rows[:, list(self.label_names).index(settings.strip)] = torch.arange(count)
        return rows, [0] * count


def _to_uint8(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    return (images * 255).round().clip(0, 255).astype(np.uint8)


def _whole(name: str, value: Any, low: int, high: int, option: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} {value!r} must be a whole number from {low} to {high}")
    if not low <= value <= high:
        more = (
            f"; the gallery can be started with a higher {option}"
            if option and value > high
            else ""
        )
        raise UserError(f"{name} {value} must be from {low} to {high}{more}")


# PNGs that remember how they were painted, and reading that back.

CHUNK = "complexity-dit"
"""Keyword of the text chunk."""

_VERSIONS = ("complexity-dit", "diffusers", "torch")


@dataclass(frozen=True)
class Remembered:
    """What a PNG of the gallery says about itself."""

    settings: Settings
    """How its picture, or all pictures of a sheet, were painted."""

    picture: int | None
    """Which picture of the grid or strip it is; None for a whole sheet."""

    pipeline_sha256: str
    """Of the networks' configs and weights."""

    versions: dict[str, str]
    """Of the packages that painted."""


def picture_png(
    gallery: Gallery, settings: Settings, image: NDArray[np.uint8], picture: int
) -> bytes:
    """One picture at its own size, uint8 (Y, X, 3), as PNG bytes with its settings."""
    return _encode(Image.fromarray(image), gallery, settings, picture)


def sheet_png(gallery: Gallery, settings: Settings, images: NDArray[np.uint8]) -> bytes:
    """All pictures, uint8 (N, Y, X, 3), on one sheet as PNG bytes with their settings."""
    columns = sheet_columns(len(images))
    captions = gallery.captions(settings) if settings.strip is not None else []
    return _encode(draw_grid(images, columns, below=captions), gallery, settings, None)


def sheet_columns(count: int) -> int:
    """Columns of a sheet that is at least as wide as it is high."""
    return next(columns for columns in range(1, count + 1) if columns * columns >= count)


def read_png(data: bytes) -> Remembered:
    """What a PNG of the gallery says about itself.

    Raises:
        UserError: It is no PNG, or not one of the gallery.
    """
    try:
        with bombs_refused(), Image.open(io.BytesIO(data), formats=["PNG"]) as file:
            text = file.info.get(CHUNK)
    # Pillow's parsers raise almost anything on broken bytes.
    except Exception as error:
        raise UserError(f"not a PNG that can be read: {error}") from error
    if text is None:
        raise UserError(f"the PNG has no {CHUNK} text: it is not of the gallery, or was re-saved")
    try:
        told = parse_json(text)
        if not isinstance(told, dict):
            raise ValueError("it is no object")
        return filled(Remembered, told | {"settings": Settings.from_dict(told["settings"])})
    except (KeyError, ValueError) as error:
        raise UserError(f"the PNG's {CHUNK} text is not the gallery's: {error}") from error


def sample_command(gallery: Gallery, settings: Settings, pipeline: str = "PIPELINE") -> str | None:
    """The command that paints the pictures of a grid again, bit for bit; a strip has none."""
    if settings.strip is not None:
        return None
    words = ["complexity-dit", "sample", pipeline, "--out", "pictures"]
    for name, value in settings.labels.items():
        words += [f"--labels.{name}", value]
    for name in ("num_images", "seed", "num_inference_steps", "guidance_scale", "chunk_size"):
        words += [f"--{name}", f"{getattr(settings, name)}"]
    if settings.scheduler not in (None, gallery.own_scheduler):
        words += ["--scheduler", settings.scheduler]
    if settings.side not in (None, gallery.pipe.sample_size):
        words += ["--height", f"{settings.side}", "--width", f"{settings.side}"]
    return shlex.join(words)


def _encode(image: Image.Image, gallery: Gallery, settings: Settings, picture: int | None) -> bytes:
    told = {
        "settings": settings.as_dict(),
        "picture": picture,
        "pipeline_sha256": gallery.pipeline_sha256,
        "versions": {name: version(name) for name in _VERSIONS},
    }
    about = PngImagePlugin.PngInfo()
    about.add_text(CHUNK, json.dumps(told))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=about)
    return file.getvalue()
