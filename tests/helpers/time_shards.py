"""Measure images per second from a folder, from shards on the same disk, and from shards of a local server.

    python tests/helpers/time_shards.py FOLDER --images 4096 --workers 2 --rounds 5

The script draws images with the usual file size of ImageNet, writes them as a folder and as shards, and reads them as
training does (decoded, cropped to 224 and flipped) and without decoding, from each source in turn. It prints medians
and their ratios to the folder.
"""

import argparse
import functools
import http.server
import shutil
import statistics
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from shunted_lit.cli import main
from shunted_lit.data import ClassificationShardsDataModule, ImageFolderDataModule


def draw(root: Path, count: int) -> int:
    """Write a folder of JPEG files, 500 x 375 pixels, about 110 kB each; return their mean size in bytes."""
    generator, total = np.random.default_rng(0), 0
    for split, images in {"train": count, "val": 8}.items():
        for i in range(images):
            coarse = generator.integers(0, 255, (38, 50, 3), dtype=np.uint8)
            picture = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
            picture = (picture + generator.normal(0, 14, picture.shape)).clip(0, 255).astype(np.uint8)
            file = root / split / str(i % 8) / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file, quality=90)
            total += file.stat().st_size
    return total // (count + 8)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def read(data, decode: bool) -> float:
    """Return images per second of an epoch from its 49th batch on, once all worker processes have started."""
    data.setup("fit")
    if not decode:
        dataset = data.dataset("train")
        order, began = list(data.training_sampler(0)), time.perf_counter()
        for index, *_ in order:
            if hasattr(dataset, "shards"):
                dataset.shards.read(index, "label")
            else:
                Path(dataset.samples[index][0]).read_bytes()
        return len(order) / (time.perf_counter() - began)
    batches = iter(data.train_dataloader())
    for _ in range(48):
        next(batches)
    began, images = time.perf_counter(), sum(len(batch[1]) for batch in batches)
    return images / (time.perf_counter() - began)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=128, help="images per shard")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder, shards, cache = (options.folder / name for name in ("folder", "shards", "cache"))
    size = draw(folder, options.images)
    began = time.perf_counter()
    main(["shard", "--data=ImageFolderDataModule", f"--data.root={folder}", f"--out={shards}",
          f"--samples={options.samples}", f"--data.num_workers={options.workers}"])  # fmt: skip
    print(f"{size / 1e3:.0f} kB per image; written at {options.images / (time.perf_counter() - began):.0f} images/s")
    handler = functools.partial(QuietHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        small = {"batch_size": 32, "num_workers": options.workers}
        sources = {
            "folder": lambda: ImageFolderDataModule(str(folder), **small),
            "shards": lambda: ClassificationShardsDataModule(str(shards), **small, window=4),
            "server, empty cache": lambda: ClassificationShardsDataModule(url, **small, window=4, cache=str(cache)),
            "server, full cache": lambda: ClassificationShardsDataModule(url, **small, window=4, cache=str(cache)),
        }
        for decode in (True, False):
            speeds: dict[str, list[float]] = {name: [] for name in sources}
            for _ in range(options.rounds):
                for name, build in sources.items():
                    if name == "server, empty cache":
                        shutil.rmtree(cache, ignore_errors=True)
                    speeds[name].append(read(build(), decode))
            base = statistics.median(speeds["folder"])
            print("decoded and cropped" if decode else "files only, one process")
            for name, values in speeds.items():
                median = statistics.median(values)
                print(f"  {name}: {median:.0f} images/s ({min(values):.0f} to {max(values):.0f}), {median / base:.2f}")
        server.shutdown()


if __name__ == "__main__":
    run()
