"""A log says how far the work is where no progress bar is shown."""

import logging

import pytest

from inl_core.run.progress import Progress


def lines_of(caplog: pytest.LogCaptureFixture, *arguments, steps: tuple[int, ...] = (1,)):
    caplog.set_level(logging.INFO)
    with Progress(*arguments) as progress:
        for n in steps:
            progress.update(n)
    return [record.getMessage() for record in caplog.records]


def test_a_tenth_of_the_work_is_a_line(caplog):
    lines = lines_of(caplog, "sampling", 25, "image", steps=(3,) * 8 + (1,))
    assert lines[0] == "sampling: 3 of 25 images"
    assert lines[-1] == "sampling: 25 of 25 images"
    assert 8 <= len(lines) <= 10


@pytest.mark.parametrize("total", [1, 0, None])
def test_nothing_is_logged_in_other_processes_or_for_nothing(caplog, total):
    assert not lines_of(caplog, "sampling", total, "image", not total)


def test_a_terminal_has_a_bar_and_no_lines(caplog, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert not lines_of(caplog, "sampling", 2, "image", steps=(1, 1))
    assert "sampling: 100%" in capsys.readouterr().err
