"""Files that commands write: existing files are never overwritten, and no file is left incomplete."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def check_new_folder(out: Path) -> None:
    """Raise ValueError where `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not empty; choose a new folder.")


def check_new_file(out: Path, suffix: str) -> None:
    """Raise ValueError where the name of `out` does not end in `suffix`, or `out` exists."""
    if out.suffix != suffix:
        raise ValueError(f"{out}: the file name must end in {suffix}.")
    if out.exists():
        raise ValueError(f"{out} already exists; remove it or choose another file.")


def lock_folder(folder: Path) -> FileLock:
    """Create and lock a folder that only one process may write to, until the lock is released or the process ends.

    Raises:
        ValueError: Another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another process is writing to it; wait for it or choose another folder.") from None
    return lock


def write_atomically(file: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it, so that an existing `file` is always complete."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def fingerprint_files(files: Iterable[Path], *content: Any) -> str:
    """Return a fingerprint of the files' sizes and modification times, and of further JSON content."""
    states = [(state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files)]
    return fingerprint(json.dumps([states, *content]).encode())


def fingerprint(*contents: Any) -> str:
    """Return a fingerprint (16 hexadecimal digits) of bytes or byte arrays."""
    sha = hashlib.sha256()
    for content in contents:
        sha.update(content)
    return sha.hexdigest()[:16]
