"""Files of data, read or refused by name.

Links are followed, and so are absolute paths in data.yaml and its lists: of the sets of others, see README,
"What you can rely on". Images of more than 178,956,970 pixels, twice PIL's MAX_IMAGE_PIXELS, are refused unread.
"""

import io
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

# By content, whatever the suffix; of others that PIL knows, some have programs of their own run, as EPS does.
Image.init()
FORMATS = tuple(name for name in ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP") if name in Image.OPEN)


class DamagedError(ValueError):
    """An image or a mask that can't be read, or is not of the size that it should be."""


# What PIL raises for damaged files. ImportError: Ultralytics, once imported, has it ask for another package there.
UNREADABLE = (ImportError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: Path | str, content: bytes | None = None) -> Image.Image:
    """An image in RGB, upright. Raises DamagedError naming the file where it is missing or can't be read.

    Args:
        path: the file, or its name where `content` is what it holds.
        content: see there.
    """
    try:
        if content is None:
            check_file(path)
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image)  # as viewers show it, and as labels are drawn
            if upright.mode.startswith(("I", "F")):  # 16 bits a pixel or more, which PIL would clip to white
                pixels = np.asarray(upright, dtype=np.float64)
                if not (pixels.size and pixels.min() >= 0 and pixels.max() < 2**16) or upright.mode == "F":
                    raise ValueError(f"mode {upright.mode}: 8 or 16 bits a pixel are read")
                if upright.mode.startswith("I;16") or pixels.max() > 255:
                    pixels /= 257
                upright = Image.fromarray(pixels.astype(np.uint8))
            return upright.convert("RGB")
    except FileNotFoundError:
        raise DamagedError(f"{path}: no such image") from None
    except UNREADABLE as error:
        raise DamagedError(f"{path}: not a readable image ({error})") from error


def check_file(path: Path | str) -> None:
    """Raises OSError where what is there is no file: a pipe would be waited for without end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a file")


def warn_unsupported_images(folder: Path | str, files: Iterable[Path]) -> None:
    """Warns of images in formats that are not read."""
    kinds = Image.registered_extensions()
    known = {suffix for suffix, kind in kinds.items() if kind in Image.OPEN} - IMAGE_SUFFIXES
    if others := Counter(path.suffix for path in files if path.suffix.lower() in known):
        told = ", ".join(f"{count} {suffix}" for suffix, count in others.items())
        log.warning("%s: images of other formats are left out (%s)", folder, told)


def read_lines(file: Path) -> list[str]:
    """Lines of a text file. Raises ValueError naming it where it can't be read."""
    try:
        check_file(file)
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a readable text file ({error})") from error


def read_size(path: Path | str) -> tuple[int, int]:
    """Width and height of an image, upright, from its header; where that hides how it is turned, as it is stored.

    Raises:
        DamagedError: naming the file.
    """
    try:
        check_file(path)
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            # Of a TIFF file PIL tells the size as it is once turned; in a PNG file it may stand behind the pixels.
            known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            turned = known and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except FileNotFoundError:
        raise DamagedError(f"{path}: no such image") from None
    except UNREADABLE as error:
        raise DamagedError(f"{path}: not a readable image ({error})") from error
    return (height, width) if turned else (width, height)
