"""Files that are not what they should be: pipes, devices, links, and files without an end."""

import os
from pathlib import Path

KINDS = ("pipe", "device", "link", "sparse")


def make_strange(path: Path, kind: str) -> None:
    """Replace a file: by a "pipe" nobody writes to, a link to an endless "device", a "link" to the
    file itself under another name, or a "sparse" file of 60 GB."""
    content = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "link":
            elsewhere = path.with_name(f"elsewhere-{path.name}")
            elsewhere.write_bytes(content)
            path.symlink_to(elsewhere)
        case "sparse":
            with path.open("wb") as file:
                file.truncate(60 * 2**30)
