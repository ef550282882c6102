"""Folders that may come from elsewhere and are written into: no link in them may lead the writing outside."""

from __future__ import annotations

import os
from pathlib import Path

from clipdistill.errors import InputError


def is_inside(folder: Path, path: Path) -> bool:
    """Whether `path`, with every link in it followed, lies in `folder`."""
    root = os.path.realpath(folder)
    return os.path.realpath(path).startswith(root.rstrip(os.sep) + os.sep)


def refuse_links(folder: Path, what: str) -> None:
    """Raise InputError when anything below `folder` is a link to something outside it; `what` names the folder.

    The folder itself may be reached through a link: the user named it. Links below it are not: whoever made the folder
    made them, and appending to `log.jsonl` would append to any file it points at.
    """
    root = os.path.realpath(folder)
    waiting = [root]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except FileNotFoundError:
            continue  # not made yet, or taken away by another process
        for entry in entries:
            if entry.is_symlink():
                if not is_inside(folder, Path(entry.path)) and os.path.realpath(entry.path) != root:
                    raise InputError(
                        f"{what} {folder}: '{os.path.relpath(entry.path, root)}' is a link that leads outside the "
                        "folder, and writing would follow it: copy what it points at, or link the folder as a whole"
                    )
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
