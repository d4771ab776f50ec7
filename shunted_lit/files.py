"""Nothing of a user's is overwritten: commands write to new files and folders."""

import hashlib
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def check_new(out: Path) -> None:
    """Raises ValueError where `out` is there already and holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty; name a new folder")


def check_new_file(out: Path, suffix: str) -> None:
    """Raises ValueError where `out` has another suffix, or is there already."""
    if out.suffix != suffix:
        raise ValueError(f"{out}: the name must end in {suffix}")
    if out.exists():
        raise ValueError(f"{out} is there already; remove it, or name another file")


def only_one(folder: Path) -> FileLock:
    """A lock on a folder that one process writes to, until it is released or the process ends.

    Raises:
        ValueError: another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another process is writing to it; wait for it, or name another folder") from None
    return lock


def digest(*contents: Any) -> str:
    """By which bytes, or arrays of bytes, are known again."""
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.hexdigest()[:16]
