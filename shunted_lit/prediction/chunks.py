"""Chunks of a prediction run: each is written by one rank and kept, so that an interrupted run can be resumed."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from shunted_lit.utils.files import lock_folder, write_atomically

MAX_CHUNK_SIZE = 1000  # images: at most this many per rank are predicted again after an interruption


class Chunks:
    """Records of images 0 .. count - 1, stored as JSON lines in files of equal size; only complete files are kept.

    Rank 0 calls `start`, then every rank calls `load` and writes the records of its `remaining_images`.

    Args:
        folder: folder of the chunks and of `origin.json`, which holds the settings and the chunk size.
        count: number of images.
        settings: what must be equal when the run is resumed, plain values by name.
    """

    def __init__(self, folder: Path, count: int, settings: Mapping[str, Any]):
        self.folder, self.count, self.settings = folder, count, {**settings, "images": count}
        self.origin = folder / "origin.json"
        self.size = MAX_CHUNK_SIZE
        self.lock: Any = None
        self.open_chunk: int | None = None  # the one being written
        self.file: TextIO | None = None

    def start(self, world_size: int) -> None:
        """Lock the folder, and choose the chunk size if this is a new run."""
        self.lock = lock_folder(self.folder)
        if not self.origin.is_file():
            size = min(max(-(-self.count // (8 * world_size)), 1), MAX_CHUNK_SIZE)  # several chunks per rank
            write_atomically(self.origin, json.dumps({**self.settings, "size": size}))

    def load(self) -> None:
        """Read the chunk size.

        Raises:
            ValueError: the folder is damaged, or was started with other settings.
        """
        try:
            stored = json.loads(self.origin.read_text(encoding="utf-8"))
            self.size = int(stored["size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder}: damaged, cannot be resumed ({error}); remove this folder.") from error
        for name, value in self.settings.items():
            if stored.get(name) != value:
                raise ValueError(
                    f"{self.folder}: this prediction was started with {name} {stored.get(name)}, now it is {value}; "
                    "remove this folder to start again, or choose another --predictions.out."
                )

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.jsonl"

    @property
    def all_chunks(self) -> range:
        return range(-(-self.count // self.size))

    def count_complete(self) -> int:
        """Return the number of complete chunks."""
        return sum(self.path(chunk).is_file() for chunk in self.all_chunks)

    def images_in(self, chunk: int) -> range:
        return range(chunk * self.size, min((chunk + 1) * self.size, self.count))

    def remaining_images(self, rank: int, world_size: int) -> list[int]:
        """Return the images of the incomplete chunks that belong to a rank, in order."""
        missing = [chunk for chunk in self.all_chunks if not self.path(chunk).is_file()]
        return [image for chunk in missing[rank::world_size] for image in self.images_in(chunk)]

    def write(self, image: int, record: Mapping[str, Any]) -> None:
        """Write the record of an image; the images of a chunk must come in order and from one rank."""
        chunk = image // self.size
        images, path = self.images_in(chunk), self.path(chunk)
        unfinished = path.with_suffix(".tmp")
        if image == images[0]:
            self.open_chunk, self.file = chunk, unfinished.open("w", encoding="utf-8")
        if self.file is None or self.open_chunk != chunk:
            raise ValueError(f"Images of a chunk must be written from its first one, {images[0]}, got {image}.")
        self.file.write(json.dumps(record) + "\n")
        if image == images[-1]:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
            unfinished.replace(path)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over all records in image order, with one in memory at a time."""
        for chunk in self.all_chunks:
            with self.path(chunk).open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    def release(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.release()

    def remove(self) -> None:
        """Delete the folder."""
        self.release()
        shutil.rmtree(self.folder)
