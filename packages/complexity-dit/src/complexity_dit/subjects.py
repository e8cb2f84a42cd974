"""The two sides of an evaluation: what is measured, what it is measured against, which labels."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from complexity_dit.config import ADAPTER_FILE, DATA_FILE
from complexity_dit.distributed import main_first
from complexity_dit.image_sets import ImageSet, dataset_images, folder_images, is_source, npz_images
from complexity_dit.statistics_files import KeptStatistics, read_statistics
from inl_core.run.errors import UserError
from inl_core.run.json_files import filled, read_json_object

if TYPE_CHECKING:
    from complexity_dit.config import DataConfig
    from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Real images, with training images where the source has them, or statistics alone."""

    images: ImageSet | None = None
    train: Callable[[], ImageSet] | None = None
    statistics: KeptStatistics | None = None
    data: "DataConfig | None" = None


def open_target(
    target: "str | Path | ComplexityDiTPipeline", device: torch.device, data: "DataConfig | None"
) -> "ImageSet | ComplexityDiTPipeline":
    """What is measured: a pipeline, or images of a folder, an .npz or a source's training split.

    Raises:
        UserError: It is none of these, or cannot be read.
    """
    if not isinstance(target, str | Path):
        return target
    path = Path(target)
    if str(target).endswith(".npz"):
        images = npz_images(path)
        if images is None:
            raise UserError(f"{path} holds no images (arr_0); statistics can only be a --reference")
        return images
    if is_source(str(target)):
        return _split(_read_as(str(target), data), "train", "training images")
    networks = ("model_index.json", ADAPTER_FILE)
    if path.is_dir() and not any((path / name).is_file() for name in networks):
        return folder_images(path)
    # Imported here: two folders of images need no diffusion library.
    from complexity_dit.pipelines.sampling import load_pipeline

    return load_pipeline(str(target)).to(device)


def open_reference(reference: str, size: tuple[int, int], data: "DataConfig | None") -> Reference:
    """What is measured against: images, or statistics.

    Args:
        reference: A source (its held-out split), a folder, or an .npz of images or statistics.
        size: Height and width of the images to evaluate; a source is read at that size.
        data: How a source is read.

    Raises:
        UserError: It is none of these, cannot be read, or a source is asked for at no square size.
    """
    if reference.endswith(".npz"):
        images = npz_images(Path(reference))
        if images is not None:
            return Reference(images=images)
        return Reference(statistics=read_statistics(Path(reference)))
    if not is_source(reference):
        return Reference(images=folder_images(Path(reference)))
    if size[0] != size[1]:
        raise UserError(
            f"the images to evaluate are {size[1]}x{size[0]}, and {reference} is read as squares; "
            "give a folder of images as reference"
        )
    read = replace(_read_as(reference, data), resolution=size[0])
    return Reference(
        images=_split(read, "heldout", "held-out images"),
        train=lambda: _split(read, "train", "training images"),
        data=read,
    )


def trained_on(target: object) -> "DataConfig | None":
    """The data that a pipeline folder says it was trained on."""
    from complexity_dit.config import DataConfig

    if not isinstance(target, str | Path) or not (Path(target) / DATA_FILE).is_file():
        return None
    try:
        return filled(DataConfig, read_json_object(Path(target) / DATA_FILE))
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(target) / DATA_FILE} is no DataConfig: {error}") from error


def labels_to_ask(
    pipe: "ComplexityDiTPipeline", n: int, real: ImageSet | None, rows: NDArray[np.int64]
) -> tuple[torch.Tensor, dict[str, NDArray[np.int64]]]:
    """The label rows of n samples in the pipeline's ids: those of the real images drawn.

    Returns:
        Labels (n, F) int64 with -1 for not given, and by field the ids asked for (n,) as the
        reference numbers them; fields of which nothing is asked for are left out.
    """
    labels = torch.full((n, len(pipe.id2label)), -1, dtype=torch.int64)
    asked: dict[str, NDArray[np.int64]] = {}
    for field, names in real.label_names.items() if real else ():
        if real is None or field not in pipe.id2label:
            continue
        # Fewer real images than samples: their label rows are asked for again in turn.
        wanted = real.column(field)[np.resize(rows, n)]
        mapped = _renamed(wanted, names, list(pipe.id2label[field].items()))
        unknown = int(((mapped < 0) & (wanted >= 0)).sum())
        if unknown:
            logger.warning(
                "%d of %d %s labels are unknown to the pipeline: not asked for", unknown, n, field
            )
        labels[:, list(pipe.id2label).index(field)] = torch.from_numpy(mapped)
        if (mapped >= 0).any():
            asked[field] = np.where(mapped >= 0, wanted, -1)
    if pipe.id2label and bool((labels < 0).all()):
        logger.warning("no labels are asked for: the samples are unconditional")
    return labels, asked


def own_labels(subject: ImageSet, field: str | None, names: list[str]) -> NDArray[np.int64] | None:
    """A field's ids of a set's images as a reference with these names has them; None without."""
    if field is None or field not in subject.label_names:
        return None
    return _renamed(subject.column(field), subject.label_names[field], list(enumerate(names)))


def _renamed(
    ids: NDArray[np.int64], names: list[str], others: list[tuple[int, str]]
) -> NDArray[np.int64]:
    """Ids of ``names`` as ids of the same names among others; -1 where there is none."""
    known = {name: i for i, name in others}
    # The last entry is where -1, a missing label, looks.
    return np.array([*(known.get(name, -1) for name in names), -1], np.int64)[ids]


def _read_as(source: str, data: "DataConfig | None") -> "DataConfig":
    from complexity_dit.config import DataConfig

    return replace(data or DataConfig(), source=source)


def _split(data: "DataConfig", split: str, name: str) -> ImageSet:
    from complexity_dit.data.dataset import load_data

    return dataset_images(main_first(lambda: load_data(data, split)), name)
