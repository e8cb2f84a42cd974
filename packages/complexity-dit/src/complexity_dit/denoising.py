"""The denoising loop that every pipeline shares: predictions, guidance, scheduler steps, callbacks.

Which noise level it starts from, and what is done between steps, is the pipeline's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from complexity_dit.chunks import in_chunks
from complexity_dit.schedulers import is_guided
from complexity_dit.transformer import ComplexityDiTTransformer2DModel
from inl_core.run.errors import UserError

StepCallback = Callable[[Any, int, Tensor, dict], dict]


@dataclass(frozen=True)
class Guidance:
    """How far, where, and from what a prediction is led away.

    Attributes:
        scale: 1 is off.
        interval: Noise levels in [0, 1] within which it acts, closed.
        guide: A weaker network; None stands for the null rows of the network itself.
    """

    scale: float
    interval: tuple[float, float]
    guide: ComplexityDiTTransformer2DModel | None

    def check(self, transformer: ComplexityDiTTransformer2DModel, condition: Tensor) -> None:
        """Refuse a guide that cannot read the same input under the same labels."""
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance_interval {self.interval} must satisfy 0 <= low <= high <= 1")
        if self.guide is None:
            return
        if condition.is_floating_point():
            raise UserError(
                "label_embeds are one network's own and mean nothing to a guide: give class_labels"
            )
        for name in ("in_channels", "label_fields", "num_classes"):
            own, other = transformer.config[name], self.guide.config[name]
            if own != other:
                raise UserError(
                    f"the guide has {name} {other} and the transformer {own}: take a network that "
                    "was trained on the same data"
                )


@dataclass(frozen=True)
class Chunks:
    """Rows of one network call, and the place of the first picture among them."""

    size: int | None
    offset: int

    def run(self, network: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        return in_chunks(network, self.size, self.offset, *rows)


class DenoisingMixin:
    """The loop. Needs `transformer`, `scheduler` and what `DiffusionPipeline` has."""

    transformer: ComplexityDiTTransformer2DModel
    scheduler: SchedulerMixin
    progress_bar: Callable[..., Any]
    _callback_tensor_inputs: ClassVar[list[str]]

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def num_evaluations(self) -> int:
        """How often a network ran for each picture of the last call, guidance counted."""
        return self._num_evaluations

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def _denoise(
        self,
        x: Tensor,
        condition: Tensor,
        timesteps: Tensor,
        times: Tensor,
        guidance: Guidance,
        chunks: Chunks,
        callback: StepCallback | None,
        callback_tensors: Sequence[str],
        after_step: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """From the noise level of `timesteps[0]` to the picture.

        Args:
            x: Noisy pictures or latents, (B, C, Y, X).
            condition: Label ids (B, F) or embeddings (B, D).
            timesteps: What the scheduler is stepped with; no steps leave `x` as it is.
            times: What the network is told, in [0, 1000], one for each.
            guidance: What predictions are led away from.
            chunks: How many pictures a network call has.
            callback: As in the call of the pipeline.
            callback_tensors: Likewise.
            after_step: Takes the number of a step and what it made, before the callback sees it.
        """
        self._guidance_scale, self._interrupt, self._num_evaluations = guidance.scale, False, 0
        self._num_timesteps = len(timesteps)
        dtype = self.transformer.dtype
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                model_input = x
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(x, t)
                guided = is_guided(times[i], guidance.scale, guidance.interval)
                prediction = self._predict(
                    model_input.to(dtype), times[i], condition, guidance if guided else None, chunks
                )
                self._num_evaluations += 1 + guided
                x = self.scheduler.step(prediction, t, x, return_dict=False)[0]
                if after_step is not None:
                    x = after_step(i, x)
                if callback is not None:
                    offered = {"latents": x}
                    tensors = {name: offered[name] for name in callback_tensors}
                    x = callback(self, i, t, tensors).get("latents", x)
                progress_bar.update()
        return x

    def _predict(
        self, x: Tensor, t: Tensor, condition: Tensor, guidance: Guidance | None, chunks: Chunks
    ) -> Tensor:
        """The transformer's prediction, led away from a weaker one if there is guidance."""

        def predict(x: Tensor, condition: Tensor) -> Tensor:
            if guidance is None:
                return _run(self.transformer, x, t, condition)
            if (guide := guidance.guide) is not None:
                strong = _run(self.transformer, x, t, condition)
                weak = _run(guide, x.to(guide.dtype), t, condition).to(strong)
            else:
                both = torch.cat([condition, self._null(condition)])
                strong, weak = _run(self.transformer, torch.cat([x, x]), t, both).chunk(2)
            return weak + guidance.scale * (strong - weak)

        return chunks.run(predict, x, condition)

    def _null(self, condition: Tensor) -> Tensor:
        """The condition of the same form that stands for "nothing given"."""
        if not condition.is_floating_point():
            return torch.full_like(condition, -1)
        fields = len(self.transformer.config.label_fields)
        # Where the transformer is: offloaded, it comes to the condition with its first forward.
        missing = torch.full((len(condition), fields), -1, device=self.transformer.device)
        return self.transformer.embed_labels(missing).to(condition)

    def _check_call(
        self, num_inference_steps: int, output_type: str, callback_tensors: Sequence[str]
    ) -> None:
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps {num_inference_steps} must be at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type {output_type!r} must be pil, np, pt or latent")
        for name in callback_tensors:
            if name not in self._callback_tensor_inputs:
                raise UserError(
                    f"callback tensor {name!r} must be one of {self._callback_tensor_inputs}"
                )


def _run(
    network: ComplexityDiTTransformer2DModel, x: Tensor, t: Tensor, condition: Tensor
) -> Tensor:
    if condition.is_floating_point():
        return network(x, t, label_embeds=condition, return_dict=False)[0]
    return network(x, t, condition, return_dict=False)[0]
