"""A log says how far the work is where no progress bar is shown."""

import logging

from inl_core.run.progress import ProgressLog


def test_a_tenth_of_the_work_is_a_line(caplog):
    caplog.set_level(logging.INFO)
    log = ProgressLog("sampling", 25, "image", shown=True)
    for _ in range(8):
        log.update(3)
    log.update()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "sampling: 3 of 25 images"
    assert lines[-1] == "sampling: 25 of 25 images"
    assert 8 <= len(lines) <= 10


def test_nothing_is_logged_beside_a_bar_or_for_nothing(caplog):
    caplog.set_level(logging.INFO)
    ProgressLog("sampling", 1, "image", shown=False).update()
    ProgressLog("sampling", 0, "image", shown=True).update()
    assert not caplog.records
