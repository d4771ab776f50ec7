"""Nothing of a user's is overwritten: commands write to new files and folders."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def check_new_folder(out: Path) -> None:
    """Raises ValueError where `out` is there already and holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty; name a new folder")


def check_new_file(out: Path, suffix: str) -> None:
    """Raises ValueError where `out` has another suffix, or is there already."""
    if out.suffix != suffix:
        raise ValueError(f"{out}: the name must end in {suffix}")
    if out.exists():
        raise ValueError(f"{out} is there already; remove it, or name another file")


def lock_folder(folder: Path) -> FileLock:
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


def write_atomically(file: Path, text: str) -> None:
    """Writes beside the place of a file and moves it there: what stands there is whole."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def fingerprint_files(files: Iterable[Path], *known: Any) -> str:
    """By which it is known whether one of the files has changed, by size and time, or what is known of them."""
    found = [(state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files)]
    return fingerprint(json.dumps([found, *known]).encode())


def fingerprint(*contents: Any) -> str:
    """By which bytes, or arrays of bytes, are known again."""
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.hexdigest()[:16]
