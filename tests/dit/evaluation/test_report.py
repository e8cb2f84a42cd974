"""report.html: a self-contained page with everything in a result."""

import html.parser
import re
from typing import Any

import numpy as np
import pytest

from complexity_dit.evaluation.breakdown import memorisation
from complexity_dit.evaluation.report import Pictures, render


class Page(html.parser.HTMLParser):
    """Parser that records elements and checks that they are closed in order."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        # Rows and cells of a heading may be left open; everything else is closed in order.
        while self.open and self.open[-1] in ("td", "th") and tag not in ("td", "th"):
            self.open.pop()
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def result() -> dict[str, Any]:
    label = {"n_generated": 60, "n_reference": 70}
    numbers = {"n": 60, "fid": 31.5, "kid_mean": 0.01, "kid_std": 0.002, "kid_stderr": 0.001}
    return {
        "metrics": {"fid": 12.345, "fid_stderr": 0.4, "kid_mean": 0.02, "label_accuracy": 0.5},
        "absent": {"inception_score": "<no> classifier"},
        "fid_over_n": {
            "sizes": [200, 100, 50],
            "values": [12.3, 14.0, 18.1],
            "infinity": 10.1,
            "low": 9.0,
            "high": 11.2,
            "curvature": 0.1,
        },
        "per_label": {
            "field": "style",
            "labels": {
                "Op_Art": label | numbers | {"floor": label | numbers | {"fid": 20.0}},
                "Fauvism": label | {"skipped": "no samples, fewer than label_min = 50"},
            },
        },
        "memorisation": {},
        "prompts": {},
        "n_generated": 200,
        "n_reference": None,
        "settings": {
            "target": "runs/<script>alert(1)</script>",
            "reference": "art",
            "extractor": {"name": "inception-v3", "resize": "tf1", "dtype": "float32"},
        },
        "versions": {},
        "weights_sha256": "abc",
        "reference_fingerprint": "",
        "target_fingerprint": "",
    }


@pytest.fixture
def pictures() -> Pictures:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    return Pictures(images, images[:3], [(images[0], images[1], "sample 0 & image 1")])


def test_the_page_contains_everything_and_is_well_formed(
    result: dict[str, Any], pictures: Pictures
) -> None:
    rng = np.random.default_rng(0)
    copies = memorisation(*rng.standard_normal((3, 30, 4)))
    page = Page(render(result, pictures, copies))
    assert page.open == []
    for words in (
        "12.345", "<no> classifier", "Op_Art", "no samples, fewer than", "sample 0 & image 1",
        "an unknown number of", "runs/<script>alert(1)</script>",
    ):  # fmt: skip
        assert words in page.words
    assert "script" not in dict(page.tags)
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # curve, labels, nearest images
    assert sum(tag == "img" for tag, _ in page.tags) == 2 + 2  # two grids, one pair


def test_the_page_refers_to_nothing_outside_itself(
    result: dict[str, Any], pictures: Pictures
) -> None:
    text = render(result, pictures)
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object"), tag
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:", "#")), value
    assert not re.search(r"url\((?!#)|@import", text)
    assert "not FID" not in text


def test_a_distance_of_another_network_is_not_called_fid(
    result: dict[str, Any], pictures: Pictures
) -> None:
    result["settings"]["extractor"]["name"] = "dinov2-32x2"
    result["metrics"] = {"fd_dinov2": 3.0}
    assert "They are not FID" in render(result, pictures)


def test_equal_results_give_equal_pages(result: dict[str, Any], pictures: Pictures) -> None:
    assert render(result, pictures) == render(result, pictures)
