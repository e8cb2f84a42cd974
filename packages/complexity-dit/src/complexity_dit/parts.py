"""What a run saves beside its network: a pipeline folder, or for an adapter an adapter folder."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffusers import ModelMixin, SchedulerMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from complexity_dit.compatibility import check_labels, check_meaning
from complexity_dit.config import ADAPTER_FILE, DATA_FILE
from complexity_dit.latents import LatentSpace
from complexity_dit.pipelines.model_card import write_card
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from inl_core.run.errors import UserError

_AVERAGE = "ema.safetensors"


@dataclass
class PipelineParts:
    """What a saved pipeline has beside its network.

    Attributes:
        scheduler: Samples from a model trained on the run's objective.
        id2label: Names of the labels, `{field: {id: name}}`.
        data: The `DataConfig` as a dict: an evaluation must hold out the same pictures. For latents
            that is the data they were made from.
        latent_space: What the pipeline decodes with; None for pixels.
    """

    folder_name: ClassVar[str] = "pipeline"

    scheduler: SchedulerMixin
    id2label: dict[str, dict[int, str]]
    data: dict[str, Any]
    latent_space: LatentSpace | None = None

    def around(self, network: ModelMixin) -> ComplexityDiTPipeline:
        """A pipeline with this network."""
        decoder = {}
        if (space := self.latent_space) is not None:
            decoder = {"vae": space.vae, "latents_mean": space.mean, "latents_std": space.std}
        return ComplexityDiTPipeline(network, self.scheduler, id2label=self.id2label, **decoder)

    def save(self, network: ModelMixin, folder: Path) -> None:
        """Write a pipeline folder with `data.json` in it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DATA_FILE).write_text(json.dumps(self.data, indent=2) + "\n")
        self.around(network).save_pretrained(folder)  # whose card reads the data

    def save_average(self, network: ModelMixin, checkpoint: Path) -> None:
        """Write the averaged weights of a checkpoint, ready to sample from."""
        self.save(network, checkpoint / self.folder_name)

    def load_average(
        self, checkpoint: Path, label_names: Mapping[str, Sequence[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Averaged weights by the network's own names.

        Args:
            checkpoint: Its folder.
            label_names: Of the data, in id order.
            config: Of the network that is to have them.

        Raises:
            UserError: If the data's labels are others, or it is another network.
            OSError: If a file cannot be read; likewise ValueError, KeyError and safetensors' error.
        """
        pipeline = checkpoint / self.folder_name
        shadow = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
        network = json.loads((pipeline / "transformer" / "config.json").read_text())
        id2label = json.loads((pipeline / "model_index.json").read_text())["id2label"]
        # JSON made the ids text and sorted the fields.
        fields = {f: id2label[f] for f in network["label_fields"]}
        names = {f: [known[str(i)] for i in range(len(known))] for f, known in fields.items()}
        check_labels(names, label_names, checkpoint)
        check_meaning(network, config, f"{checkpoint}")
        return shadow


@dataclass
class AdapterParts(PipelineParts):
    """What a saved adapter has beside its matrices.

    Attributes:
        base: Folder or Hub id of the pipeline that it was trained on.
        base_sha256: Of that pipeline's transformer.
    """

    folder_name: ClassVar[str] = "adapter"

    base: str = ""
    base_sha256: str = ""

    def save(self, network: ModelMixin, folder: Path) -> None:
        """Write an adapter folder: diffusers' file, `adapter.json`, `data.json`, a card."""
        ComplexityDiTPipeline.save_lora_weights(
            folder, network.adapter_state_dict(), network.adapter_settings()
        )
        local = Path(self.base).is_dir()
        about = {
            # Relative: a folder of runs can be moved as a whole.
            "base": os.path.relpath(self.base, folder) if local else self.base,
            "base_sha256": self.base_sha256,
            "labels": network.added_labels,
        }
        (folder / ADAPTER_FILE).write_text(json.dumps(about, indent=2) + "\n")
        (folder / DATA_FILE).write_text(json.dumps(self.data, indent=2) + "\n")
        write_card(folder)

    def save_average(self, network: ModelMixin, checkpoint: Path) -> None:
        """As for a pipeline, and the averaged parameters by name, for an exact resume."""
        super().save_average(network, checkpoint)
        trained = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
        save_file({n: p.contiguous() for n, p in trained.items()}, checkpoint / _AVERAGE)

    def load_average(
        self, checkpoint: Path, label_names: Mapping[str, Sequence[str]], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        about = json.loads((checkpoint / self.folder_name / ADAPTER_FILE).read_text())
        if about["base_sha256"] != self.base_sha256:
            raise UserError(
                f"{checkpoint} is of an adapter of another network than {self.base}: give the "
                "--init_from it was begun with"
            )
        added = {
            field: names
            for field in label_names
            if (names := list(label_names[field])[len(self.id2label[field]) :])
        }
        if about["labels"] != added:
            raise UserError(
                f"{checkpoint} brings the labels {about['labels']} and this run {added or 'none'}: "
                "give the data and --lora.labels it was begun with, or another --out"
            )
        return load_file(checkpoint / _AVERAGE)
