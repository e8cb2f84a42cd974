"""The evaluation: images -> features -> distances, floors, copies -> result.json and a report.

One implementation for the command, the library and the training loop. The target is a pipeline
(its samples are made on the fly, asked for the label rows of the reference images), or images of a
folder, an ``.npz`` or a source's training split; the reference is a data source (its held-out
split), images, or kept statistics. Started on several processes, each takes its share of images.
"""

import importlib.metadata
import json
import logging
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from complexity_dit.config import EvalConfig
from complexity_dit.distributed import (
    dead_workers_reported,
    is_main,
    main_first,
    on_main,
    pick_device,
)
from complexity_dit.features import FEATURE_CHUNK, draw, extract_features, set_features
from complexity_dit.floors import SHRUNK_FILTER
from complexity_dit.hashing import array_hash
from complexity_dit.image_sets import ImageSet, array_images
from complexity_dit.inception import FeatureExtractor, load_extractor
from complexity_dit.measures import (
    Features,
    Measurement,
    check_identity,
    kid_of,
    measure,
    measure_against,
    pooled,
    spatial,
)
from complexity_dit.memorisation import Memorisation, memorisation
from complexity_dit.metrics import distance_of_sets, feature_statistics
from complexity_dit.painted import painted_images
from complexity_dit.per_label import class_means, distances_by_label, nearest_class_mean_accuracy
from complexity_dit.pipelines.sampling import scheduler_settings
from complexity_dit.result_table import format_result
from complexity_dit.sides import Sides, check_wishes, collect
from complexity_dit.statistics_files import KeptStatistics, write_statistics
from complexity_dit.subjects import (
    labels_to_ask,
    open_reference,
    open_target,
    own_labels,
    trained_on,
)
from inl_core.run.errors import UserError
from inl_core.run.files import file_aside

if TYPE_CHECKING:
    from complexity_dit.config import DataConfig, SampleConfig
    from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline

__all__ = ["EvalConfig", "evaluate", "evaluate_images", "extract_features", "format_result"]

logger = logging.getLogger(__name__)

SAMPLES_FOLDER = "generated"


def evaluate(
    target: "str | Path | ComplexityDiTPipeline",
    reference: str | Path,
    out: str | Path | None = None,
    config: EvalConfig | None = None,
    sample: "SampleConfig | None" = None,
    data: "DataConfig | None" = None,
) -> dict[str, Any]:
    """Measure a pipeline or a set of images against real ones.

    Args:
        target: A pipeline, its folder or Hub id; a folder of images of one size; an ``.npz`` with
            ``arr_0``; or a data source, whose training split is measured.
        reference: ``art``, ``imagefolder:PATH`` or ``hub:NAME`` (its held-out split), a folder of
            images, an ``.npz`` of images (``arr_0``) or of statistics (``mu``, ``sigma``).
        out: Folder that gets ``result.json``, ``report.html`` and the samples; None writes nothing.
        config: What is measured.
        sample: How a pipeline paints (seed, steps, guidance, batch).
        data: How a source is read (hold-out fraction, label fields); by default as in the
            training of the pipeline, so that nothing it was trained on is held out. Its source
            and resolution are replaced by the reference's and the target's.

    Returns:
        The result, as written, on every process: ``metrics``, ``absent`` (what could not be
        measured, and why), ``fid_over_n``, ``per_label``, ``memorisation``, ``n_generated``,
        ``n_reference`` (None where statistics do not say), ``settings``, ``versions``,
        ``weights_sha256``, ``reference_fingerprint``, ``target_fingerprint``.

    Raises:
        UserError: Fewer than 2 images on a side, a result that exists, unreadable images or
            statistics, statistics of another extractor, floors without images to measure, a
            setting out of range, or a process that is gone.
    """
    config = config or EvalConfig()
    config.check()
    with dead_workers_reported():
        folder = Path(out) if out is not None else None
        return _evaluate(target, reference, folder, config, sample, data)


def _evaluate(
    target: "str | Path | ComplexityDiTPipeline",
    reference: str | Path,
    folder: Path | None,
    config: EvalConfig,
    sample: "SampleConfig | None",
    data: "DataConfig | None",
) -> dict[str, Any]:
    if folder and (folder / "result.json").exists() and not config.overwrite:
        raise UserError(f"{folder / 'result.json'} exists; choose another folder or set overwrite")
    device = pick_device(config.device)
    data = data or trained_on(target)
    subject = open_target(target, device, data)
    if isinstance(subject, ImageSet):
        size, n = subject.size, min(config.num_images, len(subject))
    else:
        side = subject.sample_size
        size = (sample.height or side, sample.width or side) if sample else (side, side)
        n = config.num_images
    ref = open_reference(str(reference), size, data)
    check_wishes(config, ref, str(reference), folder)
    extractor = main_first(
        lambda: load_extractor(
            *(config.weights, config.resize, config.dtype, device),
            spatial="sfid" in config.measures,
        )
    )
    if ref.statistics:
        check_identity(ref.statistics, extractor, str(reference))

    settings: dict[str, Any] = {
        "target": str(target) if isinstance(target, str | Path) else type(target).__name__,
        "reference": str(reference),
        "eval": asdict(config),
        "data": asdict(ref.data) if ref.data else None,
        "extractor": {
            **extractor.identity,
            "weights_source": extractor.weights_source,
            "device": device.type,
            "chunk": FEATURE_CHUNK,
        },
    }
    rows = draw(len(ref.images), n, config.seed) if ref.images else np.empty(0, np.int64)
    if ref.images:
        _warn_of_unequal_sides(ref.images, size, len(rows), n)
    if isinstance(subject, ImageSet):
        pipe, generated, picked = None, subject, draw(len(subject), n, config.seed)
    else:
        from complexity_dit.config import SampleConfig

        pipe, sample, picked = subject, sample or SampleConfig(), np.arange(n)
        settings |= {"sample": asdict(sample), **scheduler_settings(pipe, sample)}
        keep = folder / SAMPLES_FOLDER if folder and config.keep_images else None
        labels, asked = labels_to_ask(pipe, n, ref.images, rows)
        names = ref.images.label_names if ref.images else {}
        generated = painted_images(pipe, labels, sample, keep, config.overwrite, asked, names)
    sides = collect(generated, picked, ref, rows, extractor, config, pipe)

    def finish() -> dict[str, Any]:
        result, found = _measure_all(sides, extractor, config, settings)
        if folder:
            _write(folder, result, sides, found, extractor, config)
        return result

    result = on_main(finish)
    if is_main() and not config.quiet:
        print(format_result(result))
    return result


def _warn_of_unequal_sides(real: ImageSet, size: tuple[int, int], found: int, n: int) -> None:
    if real.size != tuple(size):
        logger.warning(
            "the images are %dx%d and the reference %dx%d: both are resized for the network, and "
            "the distance holds what that does to them",
            *(size[1], size[0], real.size[1], real.size[0]),
        )
    if found < n:
        logger.warning("the reference has %d images, fewer than n = %d", found, n)


def evaluate_images(
    generated: "ImageSet | NDArray[np.uint8]",
    reference: "ImageSet | NDArray[np.uint8] | KeptStatistics",
    config: EvalConfig | None = None,
    extractor: FeatureExtractor | None = None,
) -> Measurement:
    """The distances alone, of images at hand: no files, no floors; `evaluate` is built of the same.

    Args:
        generated: uint8 (n, H, W, 3), or an `ImageSet`.
        reference: The same, or statistics.
        config: What is measured; ``num_images`` does not matter here, all images are taken.
        extractor: The feature network; loaded as the configuration says by default.

    Returns:
        `Measurement`: ``metrics`` and what is ``absent``.

    Raises:
        UserError: As `evaluate`.
    """
    config = config or EvalConfig()
    config.check()
    extractor = extractor or load_extractor(
        *(config.weights, config.resize, config.dtype, pick_device(config.device)),
        spatial="sfid" in config.measures,
    )

    def features(images: "ImageSet | NDArray[np.uint8]") -> Features:
        images = images if isinstance(images, ImageSet) else array_images(images)
        return set_features(images, np.arange(len(images)), extractor, cache=False)

    if isinstance(reference, KeptStatistics):
        check_identity(reference, extractor, "the reference")
        return measure_against(features(generated), reference, extractor, config, "the reference")
    return measure(features(generated), features(reference), extractor, config)


def _measure_all(
    sides: Sides, extractor: FeatureExtractor, config: EvalConfig, settings: dict[str, Any]
) -> tuple[dict[str, Any], Memorisation | None]:
    """The result as JSON, and the nearest training images where they were looked for."""
    per_label: dict[str, Any] = {}
    copies = None
    if sides.true is None or sides.ref.images is None:
        assert sides.ref.statistics is not None
        kept = sides.ref.statistics
        found = measure_against(sides.fake, kept, extractor, config, settings["reference"])
        n_reference = kept.statistics.n or None
        fingerprint = kept.fingerprint or array_hash(*kept.statistics[:2])
    else:
        found = measure(sides.fake, sides.true, extractor, config)
        n_reference, fingerprint = len(sides.true), sides.ref.images.fingerprint
        x, y = pooled(sides.fake, extractor), pooled(sides.true, extractor)
        if sides.seen is not None:
            settings["n_train"] = len(sides.seen)
        per_label = _labels(sides, x, y, found, extractor, config)
        if config.floors:
            _floors(sides, y, found, extractor, config, settings)
        if sides.searched is not None:
            copies = memorisation(x, y, pooled(sides.searched, extractor))
            found.metrics["closer_than_1_percent"] = copies.closer_than_1_percent
            settings["n_searched"] = len(sides.searched)
    result = {
        "metrics": found.metrics,
        "absent": found.absent,
        "fid_over_n": found.curve,
        "per_label": per_label,
        "memorisation": _described(copies, sides) if copies else {},
        "n_generated": len(sides.fake),
        "n_reference": n_reference,
        "settings": settings | found.settings,
        "versions": _versions(),
        "weights_sha256": extractor.weights_sha256,
        "reference_fingerprint": fingerprint,
        "target_fingerprint": sides.generated.fingerprint,
    }
    return json.loads(json.dumps(result, allow_nan=False)), copies


def _labels(
    sides: Sides,
    x: Features,
    y: Features,
    found: Measurement,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> dict[str, Any]:
    """The accuracy of the labels asked for, and each label's own distances and floor."""
    ref, name = sides.ref.images, config.label_field
    if ref is None or name is None or name not in ref.label_names:
        return {}
    names = ref.label_names[name]
    real_ids = ref.column(name)[sides.rows]
    asked = own_labels(sides.generated, name, names)
    if asked is None:
        return {}
    asked = asked[sides.picked]
    train_ids = None
    if sides.train is not None and sides.seen is not None:
        train_ids = sides.train.column(name)[sides.train_rows]
        means = class_means(pooled(sides.seen, extractor), train_ids)
        found.metrics["label_accuracy"] = nearest_class_mean_accuracy(x, asked, means)
        found.metrics["label_accuracy_real"] = nearest_class_mean_accuracy(y, real_ids, means)
    table = distances_by_label(x, asked, y, real_ids, names, config, extractor.prefixes)
    for label, row in table.items():
        if "skipped" in row:
            logger.info("%s %s: %s", name, label, row["skipped"])
    if config.floors and train_ids is not None and sides.seen is not None:
        seen = pooled(sides.seen, extractor)
        floor = distances_by_label(seen, train_ids, y, real_ids, names, config, extractor.prefixes)
        for label, row in floor.items():
            table[label]["floor"] = row
    return {"field": name, "labels": table}


def _floors(
    sides: Sides,
    y: Features,
    found: Measurement,
    extractor: FeatureExtractor,
    config: EvalConfig,
    settings: dict[str, Any],
) -> None:
    """Distances of training, reconstructed and shrunk images from the reference images."""
    fd, kd = extractor.prefixes
    settings["shrunk"] = SHRUNK_FILTER
    sets = {"train": sides.seen, "vae": sides.reconstructed, "shrunk": sides.shrunk}
    for name, features in sets.items():
        if features is None:
            why = {"train": "the reference has no training split", "vae": "there is no VAE"}[name]
            found.absent[f"{fd}_{name}"] = why
            continue
        z = pooled(features, extractor)
        found.metrics[f"{fd}_{name}"] = distance_of_sets(z, y)
        if name != "shrunk":
            found.metrics[f"{kd}_{name}"] = kid_of(z, y, config).mean
    if sides.vae:
        settings["vae"] = sides.vae


def _described(copies: Memorisation, sides: Sides) -> dict[str, Any]:
    """The summary with training images by their number in the split, not in the search."""
    summary = copies.summary()
    for pair in summary["closest_pairs"]:
        pair["sample"] = int(sides.picked[pair["sample"]])
        pair["training_image"] = int(sides.searched_rows[pair["training_image"]])
    return summary


def _write(
    folder: Path,
    result: dict[str, Any],
    sides: Sides,
    copies: Memorisation | None,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> None:
    """The files of a result; result.json comes last, and says that all of them are there."""
    if config.save_statistics and sides.true is not None and sides.ref.images is not None:
        own = feature_statistics(spatial(sides.true, extractor)) if extractor.spatial_dim else None
        kept = KeptStatistics(
            *(feature_statistics(pooled(sides.true, extractor)), own, extractor.identity),
            fingerprint=sides.ref.images.fingerprint,
        )
        write_statistics(folder / "reference.npz", kept)
    if config.report:
        from complexity_dit.report import Pictures, write_report

        pictures = Pictures.of(
            *(sides.generated, sides.picked, sides.ref.images, sides.rows),
            *(sides.train, result["memorisation"].get("closest_pairs", [])),
        )
        write_report(folder / "report.html", result, pictures, copies)
    with file_aside(folder / "result.json") as scratch:
        scratch.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def _versions() -> dict[str, str]:
    names = ("complexity-dit", "inl-core", "torch", "diffusers", "transformers", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
