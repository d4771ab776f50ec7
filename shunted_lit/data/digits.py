"""Real labelled images that need no download: scikit-learn's handwritten digits."""

from pathlib import Path

import numpy as np
from PIL import Image

from shunted_lit.utils.files import check_new_folder

NAMES = [str(digit) for digit in range(10)]


def load_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (n, 8, 8), uint8, and labels (n,), for "train" (1,438 digits) and "val" (359, every fifth).

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"digits need scikit-learn ({error}): pip install 'shunted-lit[demo]'") from None
    digits = load_digits()
    images = (digits.images * 15.9375).astype(np.uint8)  # 0..16 -> 0..255
    held_out = np.arange(len(images)) % 5 == 4
    return {"train": (images[~held_out], digits.target[~held_out]), "val": (images[held_out], digits.target[held_out])}


def write_digits(out: Path) -> None:
    """Write scikit-learn's 1,797 handwritten digits, 8 x 8 pixels each, as an image folder.

    Args:
        out: folder to write, `out/train/DIGIT/*.png` and `out/val/DIGIT/*.png`; must not exist, or be empty.

    Raises:
        ValueError: a folder that is not empty; scikit-learn is not installed (extra "demo").
    """
    check_new_folder(out)
    splits = load_digits()
    for split, (images, labels) in splits.items():
        for name in NAMES:
            (out / split / name).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(out / split / NAMES[label] / f"{number:04d}.png")
    print(f"{len(splits['train'][0])} training and {len(splits['val'][0])} validation images in {out}")
