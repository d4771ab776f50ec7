"""Validation images held out of the training images, for data on disk without a validation split."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import OpenUnitInterval

from shunted_lit.data.base import BaseDataModule
from shunted_lit.data.image_io import read_text
from shunted_lit.data.validation import LabelCheck


class HeldOutDataModule(BaseDataModule):
    """Base of the data modules that can hold out training images for validation.

    A subclass sets `root`. It passes `split_to_read`, and then the images that it reads through `select`.

    Args:
        val_fraction: Fraction of the training images to hold out, for data without a validation split. A hash of an
            image's path relative to `root` decides: the split is the same on each machine, and an image keeps its
            split when others are added.
        val_list: Text file with the path of one training image per line, to hold out instead. The file and the paths
            in it are relative to `root`.
        options: Options of `BaseDataModule`.
    """

    root: Path

    def __init__(self, *, val_fraction: OpenUnitInterval | None = None, val_list: str | None = None, **options: Any):
        super().__init__(**options)
        if val_fraction is not None and val_list is not None:
            raise ValueError(f"`val_fraction` must not be set with `val_list`, got {val_fraction}; omit one of them.")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"`val_fraction` must be above 0 and below 1, got {val_fraction}.")
        self.val_fraction, self.val_list = val_fraction, val_list

    @property
    def holds_out(self) -> bool:
        return self.val_fraction is not None or self.val_list is not None

    def split_to_read(self, split: str, train: Path, val: Path) -> str:
        """Return the split in whose files the images of `split` are: "train" where images are held out.

        Args:
            split: "train" or "val".
            train: Folder or file of the training split.
            val: Folder or file of the validation split.

        Raises:
            ValueError: Images are to be held out although there is a validation split, or neither is the case.
        """
        option = "val_list" if self.val_fraction is None else "val_fraction"
        if not self.holds_out:
            if split == "val" and not val.exists():
                raise ValueError(
                    f"{val}: no such file or folder; to hold out training images instead, set `val_fraction`, such as "
                    "to 0.2."
                )
            return split
        if val != train and val.exists():
            raise ValueError(f"`{option}` is for data without a validation split, got {val}; omit the option.")
        return "train"

    def select(self, split: str, paths: Sequence[Path | str]) -> list[int]:
        """Return the indices of the images of `split`, in order; all of them where none are held out.

        Raises:
            ValueError: `val_list` names no training image, or a split has no image.
        """
        if not self.holds_out:
            return list(range(len(paths)))
        names = [Path(os.path.relpath(path, self.root)).as_posix() for path in paths]
        held_out = choose_names(names, self.val_fraction) if self.val_fraction else self.read_val_list(names)
        rows = [i for i, name in enumerate(names) if (name in held_out) == (split == "val")]
        if not rows:
            raise ValueError(
                f"{self.root}: {len(held_out)} of {len(names)} images are held out, so that {split} has none; add "
                "images, or hold out others."
            )
        return rows

    def read_val_list(self, names: Sequence[str]) -> set[str]:
        """Return the names in `val_list`. Raise ValueError for a line that is not among `names`."""
        file, known, check = Path(self.root, self.val_list or ""), set(names), LabelCheck()
        lines = {number: line.strip() for number, line in enumerate(read_text(file).splitlines(), 1) if line.strip()}
        chosen = {number: os.path.relpath(Path(self.root, line), self.root) for number, line in lines.items()}
        for number, path in chosen.items():
            if Path(path).as_posix() not in known:
                check.fail(
                    f"{file}:{number}: {lines[number]} is not among the {len(names)} training images; expected a path "
                    f"relative to {self.root}, such as {names[0]}."
                )
        check.report(file)
        return {Path(path).as_posix() for path in chosen.values()}


def choose_names(names: Sequence[str], fraction: float) -> set[str]:
    """Return the names whose hash is in the first `fraction` of all hashes; at least one name."""
    hashes = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names}
    return {name for name, value in hashes.items() if value < fraction} or {min(hashes, key=hashes.__getitem__)}
