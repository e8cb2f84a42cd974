"""`save_pretrained` over an existing folder of the user, killed anywhere; for both packages."""

import math
import os
import shutil
from functools import partial

import torch

from support.kills import operations_until


def test_a_save_that_is_killed_leaves_the_old_model_or_the_new(package, finished, tmp_path):
    source = finished / ("pipeline" if package.name == "dit" else "model")
    model = package.load(source)
    network = model.transformer if package.name == "dit" else model
    first = next(iter(network.state_dict()))
    old = network.state_dict()[first].clone()
    with torch.no_grad():
        network.state_dict()[first].add_(1)

    def folder_of_the_user(name):
        folder = shutil.copytree(source, tmp_path / name)
        (folder / "notes.txt").write_text("the user's")
        (folder / "README.md").write_text("edited")
        return folder

    complete = folder_of_the_user("complete")
    total, seen = operations_until(math.inf, partial(model.save_pretrained, complete)), set()
    assert total > 20
    # The last operations put the new files in place of the old ones.
    for operations in sorted({*range(0, total, total // 8), *range(total - 20, total + 1)}):
        folder = folder_of_the_user(f"at-{operations}")
        killed = operations_until(operations, partial(model.save_pretrained, folder)) is None
        assert killed == (operations < total)
        loaded = package.load(folder)
        now = (loaded.transformer if package.name == "dit" else loaded).state_dict()[first]
        is_new = torch.equal(now, old + 1)
        assert is_new or torch.equal(now, old), operations
        assert is_new or killed
        seen.add(is_new)
        assert (folder / "notes.txt").read_text() == "the user's"
        assert (folder / "README.md").read_text() == "edited"
        shutil.rmtree(folder)
    assert seen == {True, False}


def test_all_files_of_a_run_have_the_permissions_that_the_umask_leaves(finished):
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in finished.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
