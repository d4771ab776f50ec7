"""scikit-learn's handwritten digits: real labelled images without a download."""

from pathlib import Path

import numpy as np
from PIL import Image

from shunted_lit.utils.files import check_new_folder

NAMES = [str(digit) for digit in range(10)]


def load_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return images (n, 8, 8), uint8, and labels (n,) of "train" (1,438 digits) and "val" (359, every fifth).

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"Digits need scikit-learn ({error}): pip install 'shunted-lit[demo]'") from None
    digits = load_digits()
    images = (digits.images * 15.9375).astype(np.uint8)  # 0..16 -> 0..255
    is_val = np.arange(len(images)) % 5 == 4
    return {"train": (images[~is_val], digits.target[~is_val]), "val": (images[is_val], digits.target[is_val])}


def write_digits(out: Path) -> None:
    """Write scikit-learn's 1,797 handwritten digits, 8 x 8 pixels each, as an image folder.

    Args:
        out: New or empty folder for `train/DIGIT/*.png` and `val/DIGIT/*.png`.

    Raises:
        ValueError: The folder is not empty, or scikit-learn is not installed (extra "demo").
    """
    check_new_folder(out)
    splits = load_digits()
    for split, (images, labels) in splits.items():
        for name in NAMES:
            (out / split / name).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(out / split / NAMES[label] / f"{number:04d}.png")
    print(f"{len(splits['train'][0])} training and {len(splits['val'][0])} validation images in {out}")
