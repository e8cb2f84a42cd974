"""The evaluation: images, features, distances, then result.json and a report.

The command, the library and the training loop share this implementation. The target is a pipeline,
whose samples are generated with the labels of the reference images, or it is the images of a
folder, an ``.npz`` or the training split of a data source. The reference is a data source (its
held-out split), images, or stored statistics. With several processes, each takes a part of the
images.
"""

import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from complexity_dit.config import (
    RUN_KIND,
    DataConfig,
    EvalConfig,
    EvalSampleConfig,
    SampleConfig,
)
from complexity_dit.distributed import (
    is_main,
    main_first,
    on_main,
    pick_device,
)
from complexity_dit.evaluation.breakdown import (
    SHRUNK_FILTER,
    Memorisation,
    class_means,
    distances_by_label,
    memorisation,
    nearest_class_mean_accuracy,
    shrink,
    vae_reconstruction,
)
from complexity_dit.evaluation.distances import (
    DENSITY_NEIGHBOURS,
    IMAGES_PER_FEATURE,
    PRECISION_NEIGHBOURS,
    KernelEstimate,
    Manifold,
    bootstrap,
    distance_of_sets,
    feature_statistics,
    fid_curve,
    fid_from_features,
    fid_to_statistics,
    inception_score,
    kid_from_features,
    manifold_overlap,
)
from complexity_dit.evaluation.features import FEATURE_CHUNK, draw, set_features
from complexity_dit.evaluation.image_sets import (
    ImageSet,
    KeptStatistics,
    Reference,
    array_images,
    labels_for_samples,
    labels_in_reference_ids,
    open_reference,
    open_target,
    prompts_for_samples,
    trained_on,
    write_statistics,
)
from complexity_dit.evaluation.networks import FeatureExtractor, load_extractor
from complexity_dit.evaluation.prompts import (
    PROMPTS_FILE,
    PromptMeasures,
    Sides,
    columns_of,
    measure_prompts,
)
from complexity_dit.evaluation.report import GRID_IMAGES, Pictures, format_result, render
from complexity_dit.evaluation.samples import generated_images
from complexity_dit.hashing import array_hash
from complexity_dit.pipelines.model_card import guidance_text
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sample_folders import SETTINGS_FILE, claim_samples
from complexity_dit.pipelines.sampling import recorded, scheduler_settings, with_guidance
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, remove_partial_writes
from inl_core.run.folders import claim_folder, has_result
from inl_core.run.settings import nearest
from inl_core.run.workers import report_dead_workers

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]
Rows = NDArray[np.int64]

SAMPLES_FOLDER = "generated"
EVALUATION_KIND = "complexity-dit-evaluation"


def evaluate(
    target: str | Path | ComplexityDiTPipeline,
    reference: str | Path,
    out: str | Path | None = None,
    config: EvalConfig | None = None,
    sample: SampleConfig | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """Measure a pipeline or a set of images against real images.

    Args:
        target: A pipeline, its folder or Hub id; a folder of images of one size; an ``.npz`` with
            ``arr_0``; or a data source, whose training split is measured.
        reference: ``art``, ``imagefolder:PATH`` or ``hub:NAME`` (its held-out split), a folder of
            images, or an ``.npz`` of images (``arr_0``) or of statistics (``mu``, ``sigma``).
        out: Folder for ``result.json``, ``report.html`` and the samples; None writes nothing.
        config: What is measured.
        sample: How a pipeline is sampled (seed, steps, guidance, batch); by default without
            guidance, as in the protocol.
        data: How a source is read (held-out fraction, label fields); by default as in the training
            of the pipeline, so that none of its training images is held out. Its source and
            resolution are replaced by those of the reference and the target.

    Returns:
        The result as written, on every process: ``metrics``, ``absent`` (what could not be
        measured, and why), ``fid_over_n``, ``per_label``, ``memorisation``, ``prompts``,
        ``n_generated``, ``n_reference`` (None if the statistics do not contain it), ``settings``,
        ``versions``, ``weights_sha256``, ``reference_fingerprint``, ``target_fingerprint``.

    Raises:
        UserError: Fewer than 2 images on a side, an existing result, a folder that is not one of an
            evaluation or of a run, or that another process writes to, unreadable images or
            statistics, statistics of another extractor, floors for a reference without images,
            prompts for a pipeline or a reference without captions, a setting out of range, or
            another process that has died.
    """
    config, sample = config or EvalConfig(), sample or EvalSampleConfig()
    reference, folder = str(reference), Path(out) if out is not None else None
    with report_dead_workers("start the same command again"), ExitStack() as held:
        if folder and (folder / "result.json").exists() and not config.overwrite:
            raise UserError(
                f"{folder / 'result.json'} exists; choose another folder or set overwrite"
            )
        if folder:
            on_main(lambda: held.enter_context(_claim(folder)))
        device = pick_device(config.device)
        data = data or trained_on(target)
        subject = open_target(target, device, data)
        if isinstance(subject, ImageSet):
            size, n = subject.size, min(config.num_images, len(subject))
        else:
            side = subject.sample_size
            size, n = (sample.height or side, sample.width or side), config.num_images
        captions = getattr(subject, "text_encoder", None) is not None
        if config.prompts and not captions:
            _refuse_prompts(subject)
        ref, extractor = _open_checked(reference, size, data, config, device, folder, captions)
        _check_label_field(config.label_field, subject.label_names, ref.images)
        settings: dict[str, Any] = {
            "target": str(target) if isinstance(target, str | Path) else type(target).__name__,
            "reference": reference,
            "eval": asdict(config),
            "data": asdict(ref.data) if ref.data else None,
            "extractor": {
                **extractor.identity,
                "weights_source": extractor.weights_source,
                "device": device.type,
                "chunk": FEATURE_CHUNK,
            },
        }
        real_rows = draw(len(ref.images) if ref.images else 0, n, config.seed)
        if ref.images and ref.images.size != tuple(size):
            logger.warning(
                "the images are %dx%d and the reference %dx%d: both are resized for the network, "
                "which affects the distance",
                *(size[1], size[0], ref.images.size[1], ref.images.size[0]),
            )
        _warn_of_compression(subject, ref.images)
        if ref.images and len(real_rows) < n:
            logger.warning("the reference has %d images, fewer than n = %d", len(real_rows), n)
        if isinstance(subject, ImageSet):
            pipe, images, generated_rows = None, subject, draw(len(subject), n, config.seed)
        else:
            pipe, generated_rows = subject, np.arange(n)
            sample = with_guidance(pipe, sample)
            if pipe.config.guidance is not None:
                logger.info(
                    "sampled with %s; the pipeline recommends %s",
                    *(guidance_text(one) for one in (asdict(sample), pipe.guidance)),
                )
            settings |= {"sample": recorded(sample), **scheduler_settings(pipe, sample)}
            keep = folder / SAMPLES_FOLDER if folder and config.keep_images else None
            if keep:
                on_main(lambda: held.enter_context(claim_samples(keep)))
            labels, asked = labels_for_samples(pipe, n, ref.images, real_rows, sample.seed)
            names = ref.images.label_names if ref.images else {}
            prompts = prompts_for_samples(pipe, n, ref.images, real_rows, sample.seed)
            if prompts is not None:
                settings["prompts"] = "captions of the reference"
            images = generated_images(
                pipe, labels, sample, keep, config.overwrite, asked, names, prompts
            )
        features = collect(images, generated_rows, ref, real_rows, extractor, config, pipe)
        if config.prompts and pipe is not None:
            features.prompts = prompts

        def finish() -> dict[str, Any]:
            result, copies, measured = _measure_all(features, extractor, config, settings)
            if folder:
                _write(folder, result, features, copies, measured, extractor, config)
            return result

        result = on_main(finish)
        if is_main() and not config.quiet:
            print(format_result(result))
        return result


def evaluate_images(
    generated: ImageSet | NDArray[np.uint8],
    reference: ImageSet | NDArray[np.uint8] | KeptStatistics,
    config: EvalConfig | None = None,
    extractor: FeatureExtractor | None = None,
) -> "Measurement":
    """Compute the distances of given images, without files and floors.

    Args:
        generated: uint8 (n, H, W, 3), or an `ImageSet`.
        reference: The same, or statistics.
        config: What is measured; ``num_images`` is ignored, as all images are used.
        extractor: The feature network; loaded as configured by default.

    Raises:
        UserError: As `evaluate`.
    """
    config = config or EvalConfig()
    extractor = extractor or load_extractor(
        config.weights, config.resize, config.dtype, pick_device(config.device)
    )

    def features(images: ImageSet | NDArray[np.uint8]) -> Features:
        images = images if isinstance(images, ImageSet) else array_images(images)
        return set_features(images, np.arange(len(images)), extractor, cache=False)

    if isinstance(reference, KeptStatistics):
        check_identity(reference, extractor, "the reference")
        return measure(features(generated), reference, extractor, config)
    return measure(features(generated), features(reference), extractor, config)


def _refuse_prompts(subject: ImageSet | ComplexityDiTPipeline) -> NoReturn:
    """Say what to measure in place of prompts."""
    if isinstance(subject, ImageSet):
        raise UserError(
            "prompts needs a pipeline with a text encoder, and the target is images; set it false"
        )
    fields = ", ".join(subject.id2label) or "none"
    raise UserError(
        "prompts needs a pipeline with a text encoder, and this one has none; its label fields are "
        f"{fields}: --label_field measures one of these"
    )


def _warn_of_compression(subject: object, real: ImageSet | None) -> None:
    ours, theirs = getattr(subject, "jpegs", None), getattr(real, "jpegs", None)
    if ours is not None and theirs is not None and abs(ours - theirs) > 0.1:
        logger.warning(
            "%.0f %% of the images and %.0f %% of the reference are JPEG files: the distance also "
            "measures the compression, which can double it; compare files of one format",
            *(100 * ours, 100 * theirs),
        )


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Lock the folder of an evaluation, or that of a run, and clear what a killed one left."""
    with claim_folder(folder, EVALUATION_KIND, (RUN_KIND,), _is_evaluation_of_0_1_0):
        remove_partial_writes(folder)
        yield


def _is_evaluation_of_0_1_0(folder: Path) -> bool:
    return (folder / SAMPLES_FOLDER / SETTINGS_FILE).is_file() or has_result(folder)


def _check_label_field(
    field: str | None, of_target: dict[str, list[str]], real: ImageSet | None
) -> None:
    """Refuse a field that no side has, unless it is the default: that one does not always apply."""
    known = list(dict.fromkeys([*of_target, *(real.label_names if real else ())]))
    if field not in (None, EvalConfig.label_field, *known):
        raise UserError(
            f"neither side has a label field {field!r}{nearest(field, known)}; their fields are "
            f"{', '.join(known) or 'none'}"
        )


def check_reference(
    reference: str | Path,
    size: tuple[int, int],
    data: DataConfig,
    config: EvalConfig,
    captions: bool = False,
) -> None:
    """Do all of `evaluate` that can fail because of the reference, and measure nothing.

    For a training, which finds out before its first step. The pictures of a folder are read once,
    and the feature network is fetched.

    Args:
        reference: As for `evaluate`.
        size: Height and width of the images that will be measured.
        data: As for `evaluate`.
        config: The settings of the evaluation; its output folder is taken as given.
        captions: Whether a pipeline with a text encoder will be measured.

    Raises:
        UserError: As `evaluate`.
    """
    reference, device = str(reference), pick_device(config.device)
    ref, _ = _open_checked(reference, size, data, config, device, Path(), captions)
    rows = draw(
        len(ref.images) if ref.images else config.num_images, config.num_images, config.seed
    )
    if len(rows) < 2:
        raise UserError(
            f"an evaluation of {len(rows)} images against {reference}: a distance needs 2 or more "
            f"on both sides, and num_images is {config.num_images}"
        )
    if ref.images is None:
        return
    for start in range(0, len(rows), FEATURE_CHUNK):
        ref.images.read(rows[start : start + FEATURE_CHUNK].tolist())


def _open_checked(
    reference: str,
    size: tuple[int, int],
    data: DataConfig | None,
    config: EvalConfig,
    device: torch.device,
    folder: Path | None,
    captions: bool,
) -> tuple[Reference, FeatureExtractor]:
    """The reference and the feature network, once they are known to fit the request."""
    ref = open_reference(reference, size, data, captions)
    check_request(config, ref, reference, folder)
    extractor = main_first(
        lambda: load_extractor(config.weights, config.resize, config.dtype, device)
    )
    if ref.statistics:
        check_identity(ref.statistics, extractor, reference)
    return ref, extractor


def check_request(config: EvalConfig, ref: Reference, reference: str, folder: Path | None) -> None:
    """Raise a `UserError`, before any work, for what the reference or the output cannot give."""
    if config.floors and ref.images is None:
        raise UserError(f"floors need images, and {reference} holds statistics; set floors false")
    if config.memorisation and ref.train is None:
        raise UserError(
            f"memorisation needs training images, and {reference} has none; give a data source "
            "(art, imagefolder:PATH, hub:NAME) as --reference, or set memorisation false"
        )
    if config.prompts and ref.train is None:
        raise UserError(
            f"prompts needs pictures with captions, and {reference} has none; give a data source "
            "(imagefolder:PATH, hub:NAME) as --reference, or set prompts false"
        )
    if config.save_statistics and (folder is None or ref.images is None):
        raise UserError("save_statistics needs an output folder and a reference of images")


def check_identity(kept: KeptStatistics, extractor: FeatureExtractor, source: str) -> None:
    """Raise a `UserError` for statistics made with another extractor."""
    if kept.identity:
        own = extractor.identity
        differ = [
            f"{k} {kept.identity[k]}, not {own[k]}" for k in own if kept.identity[k] != own[k]
        ]
        if differ:
            raise UserError(
                f"{source} was made with another extractor: {'; '.join(differ)}. Evaluate with "
                "the same one, or make the statistics again (--save_statistics true)"
            )
    elif not extractor.is_inception:
        raise UserError(
            f"{source} cannot be compared with features of {extractor.name}: it does not name its "
            "extractor, and such files are made with Inception"
        )
    elif kept.statistics.mu.size != extractor.feature_dim:
        raise UserError(
            f"{source} holds {kept.statistics.mu.size} features and {extractor.name} gives "
            f"{extractor.feature_dim}; it was made with another extractor"
        )
    else:
        logger.warning(
            "%s does not name its network and resize; they are assumed to be Inception's pool3 "
            "with resize %s",
            *(source, extractor.resize),
        )


# Features of every set of an evaluation


class Drawn(NamedTuple):
    """Images drawn from a set: the set, their numbers (n,) and their features (n, D)."""

    images: ImageSet
    rows: Rows
    features: Features


@dataclass
class EvaluationFeatures:
    """Image sets of an evaluation and their features, the same on every process.

    Attributes:
        generated: The images that are measured.
        real: The reference.
        train: Training images of the floor, as many as reference images.
        search: Training images searched for copies.
        shrunk: Features of the shrunk reference images, (m, D).
        reconstructed: Features of the reference images after the VAE, (m, D).
        vae: Name of the VAE and its hash.
        prompts: Of each of the generated images, if they are measured.
    """

    generated: Drawn
    real: Drawn | KeptStatistics
    train: Drawn | None = None
    search: Drawn | None = None
    shrunk: Features | None = None
    reconstructed: Features | None = None
    vae: str = ""
    prompts: list[str] | None = None


def collect(
    images: ImageSet,
    generated_rows: Rows,
    ref: Reference,
    real_rows: Rows,
    extractor: FeatureExtractor,
    config: EvalConfig,
    pipe: ComplexityDiTPipeline | None,
) -> EvaluationFeatures:
    """Compute the features of every set that the configuration needs, on all processes."""

    def features(images: ImageSet, rows: Rows, *transform: Any) -> Features:
        return set_features(images, rows, extractor, config.cache, *transform)

    # Features of samples and of given folders are not cached, as these change between runs.
    cache = config.cache and images.lasting
    generated = set_features(images, generated_rows, extractor, cache)
    generated = Drawn(images, generated_rows, generated)
    if ref.images is None:
        assert ref.statistics is not None
        return EvaluationFeatures(generated, ref.statistics)
    real = Drawn(ref.images, real_rows, features(ref.images, real_rows))
    found = EvaluationFeatures(generated, real)
    has_labels = pipe is not None and config.label_field in images.label_names
    searches = config.memorisation or config.prompts
    if ref.train and (config.floors or searches or has_labels):
        train = ref.train()
        if searches:
            rows = draw(len(train), config.memorisation_images or len(train), config.seed)
            found.search = Drawn(train, rows, features(train, rows))
        if config.floors or has_labels:
            rows = draw(len(train), len(real_rows), config.seed)
            # Both draws are prefixes of one permutation.
            if found.search and len(found.search.rows) >= len(rows):
                found.train = Drawn(train, rows, found.search.features[: len(rows)])
            else:
                found.train = Drawn(train, rows, features(train, rows))
    if config.floors:
        found.shrunk = features(ref.images, real_rows, shrink, f"shrunk: {SHRUNK_FILTER}")
        if pipe is not None and pipe.vae is not None:
            transform, found.vae = vae_reconstruction(pipe.vae)
            found.reconstructed = features(ref.images, real_rows, transform, found.vae)
    return found


# Measures of two sets of features


@dataclass
class Measurement:
    """Result of the measures.

    Attributes:
        metrics: Name -> number.
        absent: Name -> reason for which it is missing.
        settings: Settings of the measures besides the configuration.
        curve: Frechet distance over n as JSON, or empty.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def may_lack(self, name: str) -> Iterator[None]:
        """Turn a `UserError` into the reason for which a number is absent."""
        try:
            yield
        except UserError as error:
            self.absent[name] = str(error)


def measure(
    generated: Features,
    real: Features | KeptStatistics,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> Measurement:
    """Compute all configured measures of two sets of features.

    Args:
        generated: (n, D) from the extractor.
        real: (m, D), or statistics of the same extractor, which give the Frechet distance alone.
        extractor: The extractor of both; it determines the names of the distances.
        config: Measures and their settings.

    Raises:
        UserError: Fewer than 2 images on a side, or features that are not finite.
    """
    found, wanted = Measurement(), config.measures
    fd, kd = extractor.prefixes
    overlap = ", ".join(Manifold._fields)
    if isinstance(real, KeptStatistics):
        if "fid" in wanted:
            found.metrics[fd] = fid_to_statistics(generated, real.statistics)
        names = {"fid": f"{fd}_stderr, {fd}_infinity", "kid": kd, "prdc": overlap}
        reason = "the reference is statistics; this needs the images"
        found.absent |= {name: reason for key, name in names.items() if key in wanted}
    else:
        if "fid" in wanted:
            found.metrics[fd] = fid_from_features(generated, real)
            _error_and_curve(found, fd, generated, real, config)
        if "kid" in wanted:
            kid = _kid(generated, real, config)
            found.metrics |= kid.named(kd)
            if f"{kd}_stderr" not in found.metrics:
                found.absent[f"{kd}_stderr"] = "it needs 4 images on each side"
            found.settings["kid"] = {"subsets": kid.subsets, "subset_size": kid.subset_size}
        if "prdc" in wanted:
            with found.may_lack(overlap):
                found.metrics |= manifold_overlap(generated, real)._asdict()
                found.settings["neighbours"] = {
                    "precision_recall": PRECISION_NEIGHBOURS,
                    "density_coverage": DENSITY_NEIGHBOURS,
                }
    if "is" in wanted:
        with found.may_lack("inception_score"):
            mean, std = _inception_score(generated, extractor)
            found.metrics |= {"inception_score_mean": mean, "inception_score_std": std}
    return found


def _kid(x: Features, y: Features, config: EvalConfig) -> KernelEstimate:
    return kid_from_features(x, y, config.kid_subsets, config.kid_subset_size, config.seed)


def _error_and_curve(
    found: Measurement, fd: str, x: Features, y: Features, config: EvalConfig
) -> None:
    """Standard error of the distance, and its extrapolation to infinite n."""
    n, features = min(len(x), len(y)), x.shape[1]
    reason = ""
    if not config.bootstrap:
        reason = "bootstrap is 0"
    elif n < IMAGES_PER_FEATURE * features:
        reason = (
            f"{n} images are too few for {features} features; it is right from "
            f"{IMAGES_PER_FEATURE * features} images"
        )
    if reason:
        names = [f"{fd}_stderr"] + [f"{fd}_infinity"] * config.curve
        found.absent |= dict.fromkeys(names, reason)
        return
    stderr = found.metrics[f"{fd}_stderr"] = bootstrap(x, y, config.bootstrap, config.seed)
    if config.curve:
        with found.may_lack(f"{fd}_infinity"):
            curve = fid_curve(x, y, stderr, seed=config.seed)
            found.curve = curve._asdict()
            found.metrics |= {
                f"{fd}_infinity": curve.infinity,
                f"{fd}_infinity_low": curve.low,
                f"{fd}_infinity_high": curve.high,
            }


def _inception_score(x: Features, extractor: FeatureExtractor) -> tuple[float, float]:
    if extractor.classifier is None:
        raise UserError(
            "the weights carry no classifier (fc): give pytorch-fid's or torch-fidelity's file"
            if extractor.is_inception
            else "it is defined on Inception's classifier; this is another network"
        )
    return inception_score(x @ extractor.classifier.cpu().numpy().T)


# The result and its files


def _measure_all(
    features: EvaluationFeatures,
    extractor: FeatureExtractor,
    config: EvalConfig,
    settings: dict[str, Any],
) -> tuple[dict[str, Any], Memorisation | None, PromptMeasures | None]:
    """The result as JSON, and in full the nearest training images and the prompts, if measured."""
    per_label: dict[str, Any] = {}
    nearest_images: dict[str, Any] = {}
    copies, measured = None, None
    generated, real, search = features.generated, features.real, features.search
    if isinstance(real, KeptStatistics):
        found = measure(generated.features, real, extractor, config)
        n_reference = real.statistics.n or None
        fingerprint = real.fingerprint or array_hash(*real.statistics[:2])
    else:
        found = measure(generated.features, real.features, extractor, config)
        n_reference, fingerprint = len(real.features), real.images.fingerprint
        if features.train:
            settings["n_train"] = len(features.train.features)
        per_label = _per_label(features, real, found, extractor, config)
        if config.floors:
            _add_floors(features, real.features, found, extractor, config)
        if search:
            copies = memorisation(generated.features, real.features, search.features)
            nearest_images = copies.summary()
            for pair in nearest_images["closest_pairs"]:
                # From rows of features to numbers of images.
                pair["sample"] = int(generated.rows[pair["sample"]])
                pair["training_image"] = int(search.rows[pair["training_image"]])
            found.metrics["closer_than_1_percent"] = copies.closer_than_1_percent
            settings["n_searched"] = len(search.features)
            if features.prompts is not None:
                measured = _prompts(features.prompts, generated, real, search, copies, config)
                found.absent |= measured.absent
    result = {
        "metrics": found.metrics,
        "absent": found.absent,
        "fid_over_n": found.curve,
        "per_label": per_label,
        "memorisation": nearest_images,
        "prompts": measured.summary if measured else {},
        "n_generated": len(generated.features),
        "n_reference": n_reference,
        "settings": settings | found.settings,
        "versions": package_versions(),
        "weights_sha256": extractor.weights_sha256,
        "reference_fingerprint": fingerprint,
        "target_fingerprint": generated.images.fingerprint,
    }
    return json.loads(json.dumps(result, allow_nan=False)), copies, measured


def _prompts(
    prompts: list[str],
    generated: Drawn,
    real: Drawn,
    train: Drawn,
    copies: Memorisation,
    config: EvalConfig,
) -> PromptMeasures:
    """How samples follow their prompts, of which the i-th is a caption of the i-th real image."""
    of_real, of_train = real.images.captions, train.images.captions
    assert of_real is not None  # as for every source that is read with captions
    assert of_train is not None
    # With fewer real images than samples, their captions are repeated.
    order = np.resize(np.arange(len(real.rows)), len(prompts))
    known = [of_real.texts_of(i) for i in real.rows[order].tolist()]
    train_known = [of_train.texts_of(i) for i in train.rows.tolist()]
    columns = columns_of(of_train, train_known, train.images.label_names)
    sides = Sides(generated.features, real.features[order], train.features)
    labelled = {
        name: generated.images.column(name)[generated.rows] >= 0
        for name in generated.images.label_names
    }
    found = measure_prompts(
        prompts, known, sides, train_known, columns, copies, labelled, config.seed
    )
    # From rows of features to numbers of images.
    found.table = {
        "reference": real.rows[order].tolist(),
        **found.table,
        "training_image": train.rows[copies.neighbours].tolist(),
    }
    return found


def _per_label(
    features: EvaluationFeatures,
    real: Drawn,
    found: Measurement,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> dict[str, Any]:
    """Accuracy of the requested labels (into `found`), and distances and floor of each label."""
    name, generated, train = config.label_field, features.generated, features.train
    sides = [name in images.label_names for images in (real.images, generated.images)]
    if name is None or not all(sides):
        if any(sides):
            found.absent[f"by {name}"] = "only one side has this label field"
        return {}
    names = real.images.label_names[name]
    asked = labels_in_reference_ids(generated.images, name, names)[generated.rows]
    real_ids = real.images.column(name)[real.rows]

    def table(x: Features, ids: Rows) -> dict[str, dict[str, Any]]:
        return distances_by_label(
            *(x, ids, real.features, real_ids, names, config, extractor.prefixes)
        )

    labels = table(generated.features, asked)
    for label, row in labels.items():
        if "skipped" in row:
            logger.info("%s %s: %s", name, label, row["skipped"])
    if train:
        train_ids = train.images.column(name)[train.rows]
        means = class_means(train.features, train_ids)
        for metric, x, ids in (
            ("label_accuracy", generated.features, asked),
            ("label_accuracy_real", real.features, real_ids),
        ):
            found.metrics[metric] = nearest_class_mean_accuracy(x, ids, means)
        if config.floors:
            for label, row in table(train.features, train_ids).items():
                labels[label]["floor"] = row
    return {"field": name, "labels": labels}


def _add_floors(
    features: EvaluationFeatures,
    real: Features,
    found: Measurement,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> None:
    """Distances of training, reconstructed and shrunk images from the reference images."""
    fd, kd = extractor.prefixes
    train = features.train.features if features.train else None
    found.settings["shrunk"] = SHRUNK_FILTER
    for name, others, reason in (
        ("train", train, "the reference has no training split"),
        ("vae", features.reconstructed, "there is no VAE"),
        ("shrunk", features.shrunk, ""),
    ):
        if others is None:
            found.absent[f"{fd}_{name}"] = reason
            continue
        found.metrics[f"{fd}_{name}"] = distance_of_sets(others, real)
        if name != "shrunk":
            found.metrics[f"{kd}_{name}"] = _kid(others, real, config).mean
    if features.vae:
        found.settings["vae"] = features.vae


def _write(
    folder: Path,
    result: dict[str, Any],
    features: EvaluationFeatures,
    copies: Memorisation | None,
    measured: PromptMeasures | None,
    extractor: FeatureExtractor,
    config: EvalConfig,
) -> None:
    """Write the files of a result; result.json is last and marks the others as complete."""
    generated, search = features.generated.images, features.search
    real = features.real if isinstance(features.real, Drawn) else None
    if config.save_statistics and real:
        statistics = feature_statistics(real.features)
        kept = KeptStatistics(statistics, extractor.identity, real.images.fingerprint)
        write_statistics(folder / "reference.npz", kept)
    if measured:
        measured.write(folder / PROMPTS_FILE)
    if config.report:
        pairs = []
        if search:
            for pair in result["memorisation"]["closest_pairs"]:
                i, j = pair["sample"], pair["training_image"]
                caption = f"sample {i}, training image {j}: {pair['distance']:.3g}"
                pairs.append((generated.read([i])[0], search.images.read([j])[0], caption))
        grids = [
            side and side.images.read(side.rows[:GRID_IMAGES].tolist())
            for side in (features.generated, real)
        ]
        with atomic_file(folder / "report.html") as scratch:
            scratch.write_text(render(result, Pictures(*grids, pairs), copies), encoding="utf-8")
    with atomic_file(folder / "result.json") as scratch:
        scratch.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def package_versions() -> dict[str, str]:
    """Versions of what a result depends on, by package."""
    names = ("complexity-dit", "inl-core", "torch", "diffusers", "transformers", "numpy", "pillow")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
