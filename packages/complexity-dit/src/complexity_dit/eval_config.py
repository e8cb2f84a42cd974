"""What an evaluation measures; every field's sentence is its ``--help``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from complexity_dit.inception import Dtype, Resize
from inl_core.run.errors import UserError

Measure = Literal["fid", "kid", "prdc", "sfid", "is"]


@dataclass
class EvalConfig:
    """What is measured, at how many images and with which network."""

    num_images: int = 2048
    """Images of each side (n); at most what a folder or the held-out split has. Compare numbers
    at equal n only."""

    seed: int = 0
    """Seed of the draw of reference images (and so of the labels asked for), of KID subsets and of
    resamples."""

    weights: str = "auto"
    """Feature network: auto (search for Inception, then a random network whose distance is named
    fd_random), random, a file of Inception weights, or the folder of a transformers vision model
    (DINOv2, CLIP), whose distance is named after it."""

    resize: Resize = "tf1"
    """How images reach 299 px: tf1 (torch-fidelity, ADM), pytorch-fid or antialias (torchmetrics).
    """

    dtype: Dtype = "float32"
    """Arithmetic in the feature network; bfloat16 is faster and only for tracking a training."""

    device: str = "auto"
    """Where everything runs: auto, cpu, cuda, cuda:1."""

    measures: list[Measure] = field(default_factory=lambda: ["fid", "kid", "prdc", "sfid", "is"])
    """fid, kid, prdc (precision, recall, density, coverage), sfid, is (Inception score). What
    cannot be had is named in the result, with the reason."""

    kid_subsets: int = 100
    """Random subsets KID is averaged over."""

    kid_subset_size: int = 1000
    """Images in a KID subset; reduced to n when n is smaller."""

    bootstrap: int = 20
    """Resamples for the standard error of the Frechet distance; 0 for none."""

    curve: bool = True
    """Measure the Frechet distance at n, n/2, n/4 and n/8 and continue it to infinite n; needs the
    bootstrap."""

    label_field: str | None = "style"
    """Label measured by itself, each name, and whose accuracy is measured (nearest class mean in
    feature space, fitted on training images); null for none."""

    label_min: int = 50
    """Images of either side that a label needs for its own numbers."""

    floors: bool = False
    """Also measure the training split, the VAE's reconstruction of the held-out images where the
    pipeline has a VAE, and the held-out images shrunk to 8 px and back, against the held-out
    images."""

    memorisation: bool = False
    """Look for the nearest training image of every sample, beside those of held-out images."""

    memorisation_images: int | None = None
    """Training images searched; null for all of them."""

    keep_images: bool = True
    """Keep the samples as PNGs in the output folder: an interrupted run goes on from them."""

    report: bool = True
    """Write report.html into the output folder."""

    save_statistics: bool = False
    """Write statistics of the reference (reference.npz) into the output folder: a later
    --reference."""

    cache: bool = True
    """Keep features of real images in the user's cache folder."""

    overwrite: bool = False
    """Replace a result that is already in the output folder, and samples of other settings."""

    quiet: bool = False
    """Print no table at the end."""

    @classmethod
    def brief(cls, **fields: Any) -> "EvalConfig":
        """FID and KID alone: every further measure costs minutes of one core, `fields` aside."""
        brief = {
            "measures": ["fid", "kid"], "bootstrap": 0, "curve": False, "label_field": None,
            "report": False,
        }  # fmt: skip
        return cls(**(brief | fields))

    def check(self) -> None:
        """Raise a `UserError` for a value out of range."""
        if self.num_images < 2:
            raise UserError(f"num_images is {self.num_images}; a distance needs at least 2")
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise UserError(f"bootstrap is {self.bootstrap}; expected 0 for none, or 2 and more")
        if self.label_min < 2:
            raise UserError(f"label_min is {self.label_min}; a distance needs at least 2 images")
        if self.memorisation_images is not None and self.memorisation_images < 2:
            raise UserError(
                f"memorisation_images is {self.memorisation_images}; expected at least 2, or null"
            )
        known = ("fid", "kid", "prdc", "sfid", "is")
        if not self.measures or set(self.measures) - set(known):
            raise UserError(f"measures is {self.measures}; expected some of {', '.join(known)}")
