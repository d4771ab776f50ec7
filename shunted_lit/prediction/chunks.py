"""Work on many images in parts, each done by one process and kept, so that what was cut off goes on where it was."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from shunted_lit.utils.files import lock_folder, write_atomically


class Chunks:
    """Records of the images 0 .. count - 1, a JSON line each, `size` of them a file; a file is there once it is whole.

    Args:
        folder: for the files; `origin.json` in it tells what they are of.
        count: of the images.
        origin: what all parts have to be of, plain values by name.

    Raises:
        ValueError: the folder holds parts of something else, naming what differs.
    """

    MOST = 1000  # images a part: so many are done anew, for each process, after a run was cut off

    def __init__(self, folder: Path, count: int, origin: Mapping[str, Any]):
        self.folder, self.count, self.origin = folder, count, {**origin, "images": count}
        self.size = self.MOST
        self.number = -1  # of the part that is being written
        self.file: TextIO | None = None
        self.lock: Any = None  # of the process that began

    def begin(self, processes: int) -> None:
        """Makes the folder, or goes on with what is there. One process calls it, before the others `join`."""
        self.lock = lock_folder(self.folder)
        file = self.folder / "origin.json"
        if not file.is_file():
            size = min(max(-(-self.count // (8 * processes)), 1), self.MOST)  # several for each process
            write_atomically(file, json.dumps({**self.origin, "size": size}))

    def join(self) -> None:
        try:
            there = json.loads((self.folder / "origin.json").read_text(encoding="utf-8"))
            self.size = int(there["size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder}: can't go on from what is there ({error}); remove this folder") from error
        for name, value in self.origin.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{self.folder}: was begun with {name} {there.get(name)}, but now it is {value}; remove this "
                    "folder to begin anew, or name another one to write to"
                )

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"

    @property
    def numbers(self) -> range:
        """Of all parts."""
        return range(-(-self.count // self.size))

    def done(self) -> int:
        """Number of the parts that are there."""
        return sum(self.path(number).is_file() for number in self.numbers)

    def images_of(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def to_do(self, process: int, processes: int) -> list[int]:
        """Images of this process, of the parts that are not there, in order."""
        missing = [number for number in self.numbers if not self.path(number).is_file()]
        return [image for number in missing[process::processes] for image in self.images_of(number)]

    def add(self, image: int, record: Mapping[str, Any]) -> None:
        """A record; those of a part have to come in order, by the same process."""
        images = self.images_of(image // self.size)
        if image == images[0]:
            self.number = image // self.size
            self.file = self.path(self.number).with_suffix(".part").open("w", encoding="utf-8")
        if self.file is None or self.number != image // self.size:
            raise ValueError(f"image {image} is not the first of its part, {self.number} is being written")
        self.file.write(json.dumps(record) + "\n")
        if image == images[-1]:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
            self.path(self.number).with_suffix(".part").replace(self.path(self.number))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in order, one in memory at a time."""
        for number in self.numbers:
            with self.path(number).open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    def release(self) -> None:
        """Lets others write here."""
        if self.lock is not None:
            self.lock.release()

    def remove(self) -> None:
        """Once they were put together."""
        self.release()
        shutil.rmtree(self.folder)
