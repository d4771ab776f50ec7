"""Reading of image and text files; errors name the file.

Symbolic links and absolute paths are followed. Images of more than `MAX_PIXELS` are refused before they are decoded.
"""

import io
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
IMAGE_ENDINGS = ", ".join(sorted(IMAGE_SUFFIXES))  # for messages
MAX_PIXELS = 178_956_970  # twice PIL's MAX_IMAGE_PIXELS, where PIL refuses an image

# A file's format follows from its content. Other formats that PIL knows are not tried: EPS, for one, runs a program.
Image.init()
FORMATS = tuple(name for name in ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP") if name in Image.OPEN)


class DamagedError(ValueError):
    """An image or mask cannot be read, or has another size than expected."""


# What PIL raises for damaged files. ImportError: once imported, Ultralytics makes PIL ask for another package there.
UNREADABLE = (ImportError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@contextmanager
def open_image(path: Path | str, content: bytes | None = None, kind: str = "image") -> Iterator[Image.Image]:
    """Open an image with PIL; errors while opening it, or in the `with` block, become DamagedError.

    Args:
        path: The file, or its name in messages where `content` is given.
        content: Bytes of the file; None to read them from `path`.
        kind: Word for the file in messages.
    """
    try:
        if content is None:
            check_is_file(path)
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise DamagedError(f"{path}: no such {kind}.") from None
    except UNREADABLE as error:
        raise DamagedError(f"{path}: not a readable {kind} ({error}).") from error


def read_image(path: Path | str, content: bytes | None = None) -> Image.Image:
    """Read an image as upright RGB; for `path` and `content` see `open_image`.

    Raises:
        DamagedError: The file is missing or cannot be read.
    """
    with open_image(path, content) as image:
        upright = ImageOps.exif_transpose(image)  # as viewers show it, and as labels are drawn
        if upright.mode.startswith(("I", "F")):  # 16 bits per pixel or more, which PIL would clip to white
            pixels = np.asarray(upright, dtype=np.float64)
            if not (pixels.size and pixels.min() >= 0 and pixels.max() < 2**16) or upright.mode == "F":
                raise ValueError(f"the image must have 8 or 16 bits per pixel, got mode {upright.mode}; convert it")
            if upright.mode.startswith("I;16") or pixels.max() > 255:
                pixels /= 257
            upright = Image.fromarray(pixels.astype(np.uint8))
        return upright.convert("RGB")


def read_size(path: Path | str) -> tuple[int, int]:
    """Read width and height of the upright image from its header, or as stored where the header lacks the orientation.

    Raises:
        DamagedError: The file is missing or cannot be read.
    """
    with open_image(path) as image:
        width, height = image.size
        # PIL gives the upright size of a TIFF file. In a PNG file, the orientation may follow the pixels.
        has_orientation = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        turned = has_orientation and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def find_images(folder: Path) -> list[Path]:
    """Return the sorted image paths below a folder, at any depth; warn about what is skipped.

    Images in unsupported formats are skipped, and so are links to folders; links to files are not.
    """
    paths = sorted(folder.rglob("*"))
    readable_by_pil = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    skipped = Counter(path.suffix for path in paths if path.suffix.lower() in readable_by_pil - IMAGE_SUFFIXES)
    if skipped:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in skipped.items())
        log.warning("%s: skipping images in unsupported formats (%s)", folder, counts)
    if links := [path for path in paths if path.is_symlink() and path.is_dir()]:
        log.warning("%s: skipping %d links to folders, such as %s", folder, len(links), links[0])
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


def check_is_file(path: Path | str) -> None:
    """Raise OSError where `path` is no regular file: reading a pipe could wait forever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a file")


def read_text(file: Path) -> str:
    """Read a UTF-8 text file. Raise ValueError, naming it, where it is missing or cannot be read."""
    try:
        check_is_file(file)
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a readable text file ({error}).") from error
