"""A data set names files of its own only."""

import os
from pathlib import Path

import pytest

from inl_core.run.dataset_files import check_card, check_data_files, check_inside
from inl_core.run.errors import UserError

OUTSIDE = ["/etc/passwd", "../secret.jsonl", "a/../../secret.jsonl", "~/secret.jsonl", "C:\\secret",
           "file:///etc/passwd", "hf://datasets/other/private/a.parquet", "zip://a::/b.zip",
           "https://example.org/a.jsonl", "..\\secret"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
    "form", ["data_files: '{}'", "data_dir: '{}'", "data_files: [{{split: train, path: ['{}']}}]"]
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_that_names_files_elsewhere_is_refused(
    tmp_path: Path, name: str, form: str, card: str
) -> None:
    text = f"configs:\n- config_name: default\n  {form.format(name)}\n"
    (tmp_path / card).write_text(f"---\n{text}---\n# Data\n" if card == "README.md" else text)
    with pytest.raises(UserError, match="which lies outside"):
        check_card(tmp_path)


def test_usual_cards_pass(tmp_path: Path) -> None:
    check_card(tmp_path)
    card = tmp_path / "README.md"
    for text in (
        "# no front matter\n",
        "---\nlicense: mit\ntags: [a, b]\n---\n",
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: 'data/**'\n"
        "dataset_info:\n  features:\n  - {name: text, dtype: string}\n---\nSee ../x and /etc\n",
    ):
        card.write_text(text)
        check_card(tmp_path)


@pytest.mark.parametrize(
    "text", ["a: &a [x]\nb: *a", "a: !!python/object:os.system 1", "a: [", "- : -"]
)
def test_a_card_that_is_no_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    with pytest.raises(UserError, match=r"README\.md cannot be read"):
        check_card(tmp_path)


def test_links_out_of_a_folder_are_refused_and_those_inside_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "a").write_text("x")
    (folder / "b").symlink_to("a")
    check_inside([str(folder / "a"), str(folder / "b")], folder)
    (tmp_path / "way").symlink_to(folder)
    check_inside([str(tmp_path / "way" / "a")], tmp_path / "way")
    (folder / "c").symlink_to(tmp_path / "secret")
    for outside in (folder / "c", tmp_path / "secret", tmp_path / "data2" / "a"):
        with pytest.raises(UserError, match="lies outside"):
            check_inside([str(outside)], folder)
    with pytest.raises(UserError, match="lies outside"):
        check_inside(["zip://a::" + str(folder / "a")], folder)


def test_a_snapshot_of_the_hub_is_links_to_its_own_blobs(tmp_path: Path) -> None:
    snapshot, blobs = (
        tmp_path / "datasets--x" / "snapshots" / "1",
        tmp_path / "datasets--x" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ab").write_text("x")
    os.symlink("../../blobs/ab", snapshot / "a.jsonl")
    check_inside([str(snapshot / "a.jsonl")], snapshot)


@pytest.mark.parametrize("name", ["a/b", "datasets/a/b", "hf://datasets/a/b"])
def test_a_data_set_of_the_hub_reads_its_own_files_only(name: str) -> None:
    own = "hf://datasets/a/b@1/x.parquet"
    check_data_files({"train": [own]}, name, None)
    check_data_files(None, name, None)
    for other in ("/etc/passwd", "hf://datasets/a/bc@1/x.parquet", "https://example.org/x"):
        with pytest.raises(UserError, match="as data, which is not its own"):
            check_data_files({"train": [own], "test": [other]}, name, None)
