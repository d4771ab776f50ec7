"""Data in shards: equality with folders, order, disks and servers, and damaged shards."""

import functools
import http.server
import json
import os
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from shunted_lit.cli import main
from shunted_lit.commands import shard as writing
from shunted_lit.data import (
    ClassificationShardsDataModule,
    CocoDataModule,
    DetectionShardsDataModule,
    ImageFolderDataModule,
    YoloDataModule,
)
from shunted_lit.data.sampling import TrainingSampler
from shunted_lit.data.shards import ShardIndex, Shards, find_entry_fault
from shunted_lit.utils.files import lock_folder
from shunted_lit.utils.seeds import seed_sample

SMALL = {"image_size": 24, "batch_size": 4, "num_workers": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 and 7 images of 3 classes, JPEG and PNG."""
    root = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(0)
    for split, count in {"train": 23, "val": 7}.items():
        for i in range(count):
            place = root / split / "abc"[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 255, (30, 20 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


def write_shards(out, *words, data="ImageFolderDataModule", samples=5):
    main(["shard", f"--data={data}", *words, "--data.num_workers=0", f"--out={out}", f"--samples={samples}"])
    return out


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    """The images of `folder` in shards of 5."""
    return write_shards(tmp_path_factory.mktemp("shards") / "out", f"--data.root={folder}")


def indices_by_name(dataset):
    return {dataset.name_of(index): index for index in range(len(dataset))}


def test_samples_equal_those_of_the_folder(folder, shards):
    expected, actual = ImageFolderDataModule(str(folder), **SMALL), ClassificationShardsDataModule(str(shards), **SMALL)
    assert actual.class_names == expected.class_names
    for split in ("train", "val"):
        left, right = expected.dataset(split), actual.dataset(split)
        assert indices_by_name(left).keys() == indices_by_name(right).keys()
        assert len(left) == len(right)
        for name, index in indices_by_name(left).items():
            pair = []
            for dataset, place in ((left, index), (right, indices_by_name(right)[name])):
                seed_sample(1, 2, 3)  # so that both are augmented alike
                pair.append(dataset[place])
            assert torch.equal(pair[0][0], pair[1][0])
            assert pair[0][1] == pair[1][1]


def test_webdataset_reads_the_shards(folder, shards):
    """WebDataset's own reader finds each image, byte for byte, and its class."""
    urls = [str(path) for path in sorted((shards / "train").glob("*.tar"))]
    found = Counter()
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        known = json.loads(sample["json"])
        image = sample.get("jpg") or sample.get("png")
        assert Path(known["name"]).read_bytes() == image
        assert "abc"[int(sample["cls"])] == Path(known["name"]).parent.name
        found[known["name"]] += 1
    assert len(found) == 23
    assert set(found.values()) == {1}


def write_coco(root):
    """Write one set for both splits in COCO's format, with masks, a crowd and an image without objects."""
    (root / "images").mkdir(parents=True)
    generator = np.random.default_rng(1)
    images, annotations = [], []
    for i in range(6):
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / f"images/{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "width": 50, "height": 40})
        for j in range(i % 3):
            box, outline = [2 + j, 3, 20, 10.5], [2 + j, 3, 22 + j, 3, 22 + j, 13.5]
            annotations.append({"id": len(annotations), "image_id": 10 + i, "category_id": 5 + j, "bbox": box,
                                "segmentation": [outline], "iscrowd": 0})  # fmt: skip
    rle = {"counts": [100, 50, 1850], "size": [40, 50]}
    crowd = {"id": 99, "image_id": 12, "category_id": 5, "bbox": [2, 20, 2, 20], "segmentation": rle, "iscrowd": 1}
    categories = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
    content = {"images": images, "annotations": [*annotations, crowd], "categories": categories}
    (root / "all.json").write_text(json.dumps(content))
    return {"root": str(root), **{f"{split}_{kind}": "images" if kind == "images" else "all.json"
                                  for split in ("train", "val") for kind in ("images", "annotations")}}  # fmt: skip


@pytest.mark.parametrize("annotation", ["boxes", "masks"])
def test_objects_equal_those_of_coco(annotation, tmp_path):
    options = write_coco(tmp_path / "coco")
    words = [f"--data.{name}={value}" for name, value in options.items()]
    out = write_shards(
        tmp_path / "out",
        *words,
        "--model=DetectionTask",
        "--model.detector=mask_rcnn",
        data="CocoDataModule",
        samples=4,
    )
    expected = CocoDataModule(**options, annotation=annotation, num_workers=0)
    actual = DetectionShardsDataModule(str(out), annotation=annotation, num_workers=0)
    assert actual.class_names == ["cat", "dog"]
    for split in ("train", "val"):
        left, right = expected.dataset(split), actual.dataset(split)
        assert indices_by_name(left).keys() == indices_by_name(right).keys()
        for name, index in indices_by_name(left).items():
            pair = []
            for dataset, place in ((left, index), (right, indices_by_name(right)[name])):
                seed_sample(1, 2, 3)
                pair.append(dataset[place])
            torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_boxes_of_yolo_stay_fractions(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in range(3):
        Image.new("RGB", (30 + i, 20)).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"labels/{i}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (tmp_path / "data.yaml").write_text("{train: images, val: images, names: [cat]}")
    out = write_shards(tmp_path / "out", f"--data.data={tmp_path / 'data.yaml'}", data="YoloDataModule")
    actual = DetectionShardsDataModule(str(out), num_workers=0).dataset("val")
    expected = YoloDataModule(str(tmp_path / "data.yaml"), num_workers=0).dataset("val")
    for index in range(3):
        torch.testing.assert_close(actual[index], expected[index], rtol=0, atol=0)
    with pytest.raises(ValueError, match="has boxes, but masks are needed; choose other data"):
        DetectionShardsDataModule(str(out), annotation="masks")


# --- the order


class CountedDataset:
    """A data set whose shards have the given numbers of images."""

    def __init__(self, counts, window):
        self.shards = object.__new__(Shards)
        self.shards.index = ShardIndex([], [], counts, [], "class", False)
        self.shards.counts, self.shards.window, self.shards.root = torch.tensor(counts), window, ""
        self.shards.ends = np.cumsum(counts)

    def __len__(self):
        return int(self.shards.ends[-1])


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_an_epoch_has_each_image_once_over_all_ranks(replicas):
    dataset = CountedDataset([7, 5, 9, 3], 2)
    keys = [key for rank in range(replicas) for key in TrainingSampler(dataset, replicas, rank, seed=1)]
    assert set(range(24)) == {key[0] for key in keys}
    assert len(keys) == 24
    assert len({key[3] for key in keys}) == 24, "each has its own seed"
    assert [key[0] for key in keys] != [
        key[0] for rank in range(replicas) for key in TrainingSampler(dataset, replicas, rank, seed=2)
    ]


def test_the_order_resumes_in_mid_epoch():
    dataset = CountedDataset([7, 5, 9, 3], 2)
    assert (
        list(TrainingSampler(dataset, 2, 1, seed=1, epoch=3, start=5))
        == list(TrainingSampler(dataset, 2, 1, seed=1, epoch=3))[5:]
    )


def test_few_shards_are_in_use_at_a_time_and_they_are_mixed():
    dataset = CountedDataset([100] * 40, 4)
    images = torch.tensor([key[0] for key in TrainingSampler(dataset, 1, 0, seed=0)]) // 100
    lasts = {shard: int((images == shard).nonzero().max()) for shard in range(40)}
    firsts = {shard: int((images == shard).nonzero().min()) for shard in range(40)}
    in_use = [sum(firsts[s] <= place <= lasts[s] for s in range(40)) for place in range(0, 4000, 50)]
    assert max(in_use) <= 4 + 2
    batches = [len(set(images[start : start + 32].tolist())) for start in range(800, 3200, 32)]
    assert np.mean(batches) > 3.5, "of 4 to 6"
    shared = [{key[0] // 100 for key in TrainingSampler(dataset, 4, rank, seed=0)} for rank in range(4)]
    assert max(map(len, shared)) <= 10 + 2 * 5, "of 40: a consecutive part, and those mixed in at its ends"


def test_repeated_images_stay_on_their_rank():
    dataset = CountedDataset([6, 6], 2)
    images = [key[0] for key in TrainingSampler(dataset, 2, 0, seed=0, repeats=3)]
    assert sorted(Counter(images).values()) == [3, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_workers_changes_nothing(workers, shards):
    batches = []
    for count in (0, workers):
        data = ClassificationShardsDataModule(str(shards), **{**SMALL, "num_workers": count}, window=2)
        data.resumed = {"seed": 3, "epoch": 0, "batches": 1}
        data.setup("fit")
        batches.append(list(data.train_dataloader()))
    assert len(batches[0]) == 4, "the first of 5 full batches was seen"
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def fit(data, root, *words):
    cli = main(["fit", f"--data={data}", f"--data.root={root}", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
                "--trainer.enable_progress_bar=false", "--report.images=0", *words])  # fmt: skip
    return Path(cli.trainer.log_dir)


CLASSIFIER = ["--model=ClassificationTask", "--model.backbone_options={stem: patch4, depths: [1, 1, 1, 1]}",
              "--data.image_size=24", "--data.batch_size=4", "--data.num_workers=1"]  # fmt: skip


def test_training_on_shards_and_prediction(shards, folder):
    run = fit("ClassificationShardsDataModule", shards, *CLASSIFIER)
    assert (run / "checkpoints/best.ckpt").is_file()
    main(["predict", f"--ckpt_path={run / 'checkpoints/best.ckpt'}", f"--data.images={folder / 'val/a'}",
          "--trainer.accelerator=cpu", "--data.num_workers=0"])  # fmt: skip
    assert len(Path("predictions/predictions.csv").read_text().splitlines()) == 4


# --- a server


class CountingHandler(http.server.SimpleHTTPRequestHandler):
    requests: ClassVar[Counter] = Counter()

    def log_message(self, *args):
        self.requests[self.path] += self.command == "GET"


@pytest.fixture
def server(shards):
    """URL of the shards, and the number of requests for each file."""
    CountingHandler.requests.clear()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(CountingHandler, directory=str(shards))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", CountingHandler.requests
        server.shutdown()


def read_both_splits(url, cache):
    data = ClassificationShardsDataModule(url, **{**SMALL, "num_workers": 2}, cache=cache)
    data.setup("fit")
    assert len(list(data.train_dataloader())) + len(list(data.val_dataloader())) == 5 + 2


def train_and_validate(url, cache):
    fit("ClassificationShardsDataModule", url, *CLASSIFIER, f"--data.cache={cache}", "--data.num_workers=2")


@pytest.mark.parametrize("use", [read_both_splits, pytest.param(train_and_validate, marks=pytest.mark.slow)])
def test_shards_of_a_server_are_fetched_once(use, server, shards, tmp_path):
    url, requests = server
    use(url, str(tmp_path / "cache"))
    tars = {path: count for path, count in requests.items() if path.endswith(".tar")}
    assert tars == {f"/{path.relative_to(shards)}": 1 for path in shards.rglob("*.tar")}
    expected, actual = (ClassificationShardsDataModule(str(root), **SMALL, cache=str(tmp_path / "cache")).dataset("val")
                   for root in (shards, url))  # fmt: skip
    for index in range(7):
        assert torch.equal(expected[index][0], actual[index][0])
    assert requests["/val/000000.tar"] == 1, "shards are cached"


def test_the_cache_keeps_its_limit(server, shards, tmp_path):
    url = server[0]
    largest = max(path.stat().st_size for path in shards.rglob("*.tar"))
    bound = 3.5 * largest / 1e9
    data = ClassificationShardsDataModule(url, **SMALL, cache=str(tmp_path), cache_gb=bound, window=1)
    data.setup("fit")
    for epoch in range(2):
        data.resumed = {"seed": 0, "epoch": epoch, "batches": 0}
        assert len(list(data.train_dataloader())) == 5
        for cache in tmp_path.iterdir():
            assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= bound * 1e9
    with pytest.raises(ValueError, match=r"`cache_gb` must be at least .*, got .*: 3 shards of up to .* MB are in use"):
        ClassificationShardsDataModule(url, **SMALL, cache=str(tmp_path), cache_gb=bound / 2, window=1)


def test_a_download_that_ends_while_room_is_made_counts(server, tmp_path, monkeypatch):
    shards = Shards(f"{server[0]}/train", cache=str(tmp_path), window=1)
    size = max(shards.index.sizes)
    shards.cache_gb = 2.5 * size / 1e9
    shards.cache.mkdir()
    (shards.cache / "old.tar").write_bytes(bytes(size))
    part = shards.cache / "new.part"
    part.write_bytes(bytes(size))
    glob = Path.glob

    def glob_and_end_download(path, pattern):
        files = list(glob(path, pattern))
        if part.exists():
            part.replace(part.with_suffix(".tar"))
        return files

    monkeypatch.setattr(Path, "glob", glob_and_end_download)
    shards.make_room(size)
    left = sum(path.stat().st_size for path in shards.cache.iterdir())
    assert left + size <= shards.cache_gb * 1e9


def test_a_shard_that_a_server_lacks_raises(server, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("shunted_lit.data.shards.time.sleep", lambda seconds: None)
    kept = shards / "val/000001.tar"
    content = kept.read_bytes()
    data = ClassificationShardsDataModule(server[0], **SMALL, cache=str(tmp_path))
    try:
        kept.unlink()
        with pytest.raises(ValueError, match=r"http://127.*/val/000001\.tar: cannot be read \(.*"):
            data.dataset("val")[6]
        kept.write_bytes(content[:-512])
        with pytest.raises(
            ValueError, match=r"val/000001\.tar: cannot be read \(received \d+ bytes, but its index states \d+"
        ):
            data.dataset("val")[6]
    finally:
        kept.write_bytes(content)
    assert data.dataset("val")[6][1] in range(3)
    with pytest.raises(ValueError, match=r"/nothing/train/index\.json: cannot be read .*; `shunted-lit shard` writes"):
        ClassificationShardsDataModule(f"{server[0]}/nothing", **SMALL)


# --- writing, and damaged shards


def test_interrupted_writing_resumes(folder, shards, tmp_path, monkeypatch):
    read_bytes, count = writing.read_bytes, iter(range(100))

    def fails(path):
        if next(count) == 12:
            raise KeyboardInterrupt
        return read_bytes(path)

    monkeypatch.setattr(writing, "read_bytes", fails)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "out", f"--data.root={folder}")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert len(done) == 2, "12 of 5 images each"
    with pytest.raises(ValueError, match=r"train/index\.json: cannot be read"):
        ClassificationShardsDataModule(str(tmp_path / "out"))
    monkeypatch.setattr(writing, "read_bytes", read_bytes)
    with pytest.raises(ValueError, match=r"holds shards of other data, .* or of another number of samples"):
        write_shards(tmp_path / "out", f"--data.root={folder}", samples=6)
    write_shards(tmp_path / "out", f"--data.root={folder}")
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in done.items())
    for path in shards.rglob("*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(shards)).read_bytes() == path.read_bytes(), path
    write_shards(tmp_path / "out", f"--data.root={folder}")  # it already exists, which is no error


def link_shards(shards, out):
    for path in shards.rglob("*"):
        if path.is_file():
            (out / path.relative_to(shards)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, out / path.relative_to(shards))
    return out


@pytest.mark.parametrize(("damage", "message"), [
    (lambda path: path.unlink(), "missing"),
    (lambda path: replace(path, path.read_bytes()[:-1024]), r"has \d+ bytes, but its index states \d+"),
])  # fmt: skip
def test_missing_and_truncated_shards_raise_before_training(damage, message, shards, tmp_path):
    root = link_shards(shards, tmp_path)
    damage(root / "train/000002.tar")
    with pytest.raises(ValueError, match=rf"train/000002\.tar: {message}"):
        fit("ClassificationShardsDataModule", root, *CLASSIFIER)
    data = ClassificationShardsDataModule(str(root), **SMALL)
    with pytest.raises(ValueError, match=r"train/000002\.tar: (missing|damaged \(has)"):
        data.dataset("train")[12]


def replace(path, content):
    path.unlink()  # a hard link
    path.write_bytes(content)


@pytest.mark.parametrize(("change", "message"), [
    ("[", "not an index of shards"),
    ({"shards": 3}, "not an index of shards"),
    ({"version": 2}, "version must be 1, got 2; install a newer release"),
    ({"shards": []}, "needs shards"),
    ({"shards": [{"name": "../a.tar", "samples": 1, "bytes": 1}]}, "needs shards, each with its own NAME.tar"),
    ({"shards": [{"name": "a::file.tar", "samples": 1, "bytes": 1}]}, "needs shards, each with its own NAME.tar"),
    ({"shards": [{"name": "a.tar", "samples": 1, "bytes": 1}] * 2}, "needs shards, each with its own NAME.tar"),
    ({"shards": [{"name": "a.tar", "samples": 0, "bytes": 1}]}, "bytes and samples above 0"),
    ({"shards": [{"name": "a.tar", "samples": 1e400, "bytes": 1}]}, "bytes and samples above 0"),
    ({"classes": "abc"}, "classes must be a list of names, got abc"),
    ({"classes": ["a"]}, "val must have the classes of .*train"),
    ({"annotation": "boxes"}, "has boxes, but class are needed"),
])  # fmt: skip
def test_an_invalid_index_raises(change, message, shards, tmp_path):
    root = link_shards(shards, tmp_path)
    file = root / "train/index.json"
    content = change if isinstance(change, str) else json.dumps({**json.loads(file.read_text()), **change})
    replace(file, content.encode())
    with pytest.raises(ValueError, match=message):
        ClassificationShardsDataModule(str(root))


def test_damaged_content_of_a_shard_raises(shards, tmp_path):
    root = link_shards(shards, tmp_path)
    path = root / "val/000000.tar"
    content = path.read_bytes()
    replace(path, content.replace(b'"label": 0', b'"label": 7'))
    data = ClassificationShardsDataModule(str(root), **SMALL)
    with pytest.raises(
        ValueError, match=r"val/000000\.tar: image 0 is damaged \(.*its classes must be 0 to 2, got \[7\]"
    ):
        data.dataset("val")[0]
    replace(path, bytes(len(content)))
    with pytest.raises(ValueError, match=r"val/000000\.tar: damaged \(.*\); write or copy it again"):
        ClassificationShardsDataModule(str(root), **SMALL).dataset("val")[0]
    replace(path, content.replace(b"\x89PNG", b"\x89PNX", 1))
    with pytest.raises(ValueError, match="found 1 error in"):
        main(["check", "--data=ClassificationShardsDataModule", f"--data.root={root}", "--data.num_workers=0",
              "--decode=true"])  # fmt: skip


def test_data_without_files_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="ShapesDataModule cannot be written as shards"):
        main(["shard", "--data=ShapesDataModule", f"--out={tmp_path / 'out'}"])
    for options, message in (
        ({"window": 0}, "`window` must be at least 1, got 0"),
        ({"cache_gb": 0}, "`cache_gb` must be above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassificationShardsDataModule(str(tmp_path), **options)


def test_only_one_process_writes_to_a_folder(folder, tmp_path):
    lock = lock_folder(tmp_path / "out")
    with pytest.raises(ValueError, match="out: another process is writing to it; wait for it or choose another folder"):
        write_shards(tmp_path / "out", f"--data.root={folder}")
    lock.release()
    write_shards(tmp_path / "out", f"--data.root={folder}")
    assert not (tmp_path / "out/.lock").exists()


def test_a_shard_deleted_before_it_is_open_is_fetched_again(server, tmp_path, monkeypatch):
    data = ClassificationShardsDataModule(server[0], **SMALL, cache=str(tmp_path))
    shards, fetch = data.shards["val"], Shards.fetch

    def fetch_and_delete(self, shard):
        path = fetch(self, shard)
        if server[1]["/val/000000.tar"] < 2:
            path.unlink()
        return path

    monkeypatch.setattr(Shards, "fetch", fetch_and_delete)
    assert shards.read(0, "label")[1][0] in range(3)
    assert server[1]["/val/000000.tar"] == 2


def test_lost_shards_are_rewritten_and_changed_images_raise(folder, shards, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(folder, source)
    write_shards(out, f"--data.root={source}")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "train/000001.tar").unlink()
    (out / "val/000000.tar").write_bytes(b"cut off")
    write_shards(out, f"--data.root={source}")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    Image.new("RGB", (9, 9)).save(source / "val/a/0.png")
    with pytest.raises(ValueError, match=r"out/val: holds shards of other data, of images that have changed since"):
        write_shards(out, f"--data.root={source}")
    (out / "train/index.json").write_text("")
    with pytest.raises(ValueError, match=r"train/index\.json: cannot be read; remove .* choose another `--out`"):
        write_shards(out, f"--data.root={source}")


def test_places_that_shards_are_not_written_to(folder, shards):
    with pytest.raises(ValueError, match="`out` must be a local folder, got s3://bucket/a"):
        main(["shard", "--data=ImageFolderDataModule", f"--data.root={folder}", "--out=s3://bucket/a"])
    for place in (folder, folder / "train", folder / "train/a/shards"):
        with pytest.raises(ValueError, match=r"holds images of the data.* choose another `--out`"):
            write_shards(place, f"--data.root={folder}")
    with pytest.raises(ValueError, match="ClassificationShardsDataModule cannot be written as shards"):
        main(["shard", "--data=ClassificationShardsDataModule", f"--data.root={shards}", f"--out={shards}2"])


def test_images_with_any_file_name_are_written(tmp_path):
    options = write_coco(tmp_path / "coco")
    images = tmp_path / "coco/images"
    content = (tmp_path / "coco/all.json").read_text()
    for i, name in enumerate(("p.json", "q.cls", "no_suffix", "r.s.PNG")):
        (images / f"{i}.png").rename(images / name)
        content = content.replace(f'"{i}.png"', f'"{name}"')
    (tmp_path / "coco/all.json").write_text(content)
    words = [f"--data.{name}={value}" for name, value in options.items()]
    out = write_shards(tmp_path / "out", *words, "--data.annotation=masks", data="CocoDataModule")
    actual = DetectionShardsDataModule(str(out), annotation="masks", num_workers=0).dataset("val")
    expected = CocoDataModule(**options, annotation="masks", num_workers=0).dataset("val")
    for index in range(6):
        torch.testing.assert_close(actual[index], expected[index], rtol=0, atol=0)


ENTRY = {"name": "a.png", "image_id": 1, "boxes": [[1, 2, 3, 4]], "labels": [0], "size": [50, 40], "crowd": [],
        "segments": [[[1, 2, 3, 2, 3, 4]]]}  # fmt: skip


@pytest.mark.parametrize("change", [
    {"boxes": None}, {"boxes": [[1, 2, 3]]}, {"boxes": [[1, 2, 3, 1e400]]}, {"boxes": "text"}, {"boxes": []},
    {"labels": [0.5]}, {"labels": [3]}, {"labels": [True]}, {"labels": 0}, {"crowd": [0, 0]}, {"image_id": "1"},
    {"size": 3}, {"size": [1, 10**12]}, {"size": None, "segments": [{"size": [9, 9], "counts": "x"}]}, {"name": 5},
    {"segments": []}, {"segments": [[[1, 2]]]}, {"segments": [[[1, 2, 3, 2, 1e9, 4]]]},
    {"segments": [{"size": [60000, 60000], "counts": [0, 3600000000]}]},
    {"segments": [{"size": [40, 50], "counts": "~~~~~"}]},
], ids=str)  # fmt: skip
def test_untrusted_entries_of_a_shard_are_checked(change):
    assert find_entry_fault(ENTRY, 3, False) is None
    try:
        message = find_entry_fault({**ENTRY, **change}, 3, False)
    except (KeyError, OverflowError, TypeError, ValueError) as error:  # `Shards.read` handles these
        message = str(error)
    assert message


def test_a_server_without_a_listing_reports_no_missing_shards(shards, tmp_path):
    class UnlistedHandler(CountingHandler):
        def list_directory(self, path):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

    handler = functools.partial(UnlistedHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        data = ClassificationShardsDataModule(url, **SMALL, cache=str(tmp_path / "cache"))
        assert data.find_faults("train") == ([], [])
        assert data.dataset("val")[0][1] in range(3)
        (tmp_path / "file").write_text("")
        data = ClassificationShardsDataModule(url, **SMALL, cache=str(tmp_path / "file"))
        with pytest.raises(ValueError, match=r"cannot be created .*; choose another folder for `cache`"):
            data.dataset("val")[0]
        server.shutdown()
