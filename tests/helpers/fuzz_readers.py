"""Coverage-guided fuzzing of the readers of untrusted files with atheris (libFuzzer), one process per reader.

    pip install atheris && python tests/helpers/fuzz_readers.py --seconds 300

A reader must return, or raise ValueError that names the file. Anything else is a crash, printed with its input.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

SEEDS = {
    "labels": [b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.2 0.1 0.2 0.3\n", b"2 nan 1e9 -1 0\n"],
    "coco": [
        b'{"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 7}], "categories": [{"id": 1, "name": "x"}'
        b'], "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "iscrowd": 0, '
        b'"segmentation": ' + segment + b"}]}"
        for segment in (
            b"[[1, 1, 4, 1, 4, 4]]",
            b'{"size": [7, 9], "counts": "07o1"}',
            b'{"size": [7, 9], "counts": [63]}',
        )
    ],
    "yaml": [b"train: a\nval: b\nnames: [x, y]\n", b"train: a\nval: b\nnames: {0: x, 1: y}\nnc: 2\n"],
}


def fuzz(reader: str, folder: Path) -> None:
    """Run forever, or until a limit of libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["shunted_lit"]):
        from shunted_lit.data.coco import add_annotations, read_categories, read_images, read_json
        from shunted_lit.data.detection import Record
        from shunted_lit.data.masks import draw_mask
        from shunted_lit.data.validation import LabelCheck
        from shunted_lit.data.yolo import read_data_yaml, read_labels

    file = folder / "input"

    def labels() -> None:
        for masks in (False, True):
            record = Record(Path("a.png"), 0, segments=[] if masks else None)
            read_labels(file, record, ["x", "y", "z"], LabelCheck())
            if record.segments:
                draw_mask(record.segments[0], 7, 9, (9, 7))

    def coco() -> None:
        content = read_json(file)
        categories, check = list(read_categories(file, content)), LabelCheck()
        records = read_images(file, content["images"], folder, check, masks=True)
        add_annotations(file, content["annotations"], records, categories, check, crowds=True)
        for record in filter(None, records.values()):
            width, height = record.size or (0, 0)
            if width * height < 10**6:
                for segment in record.segments or ():
                    draw_mask(segment, height, width)

    readers = {"labels": labels, "coco": coco, "yaml": lambda: read_data_yaml(file)}

    def read_input(content: bytes) -> None:
        file.write_bytes(content)
        try:
            readers[reader]()
        except ValueError as error:
            if str(file) not in str(error):
                raise RuntimeError(f"the message does not name the file: {error}") from error

    atheris.Setup([sys.argv[0], *sys.argv[4:]], read_input)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="time for each reader")
    seconds = parser.parse_args().seconds
    failed = 0
    for reader, seeds in SEEDS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            corpus = folder / "corpus"
            corpus.mkdir()
            for i, seed in enumerate(seeds):
                (corpus / str(i)).write_bytes(seed)
            words = [sys.executable, __file__, "--reader", reader, name, f"-max_total_time={seconds}",
                     f"-artifact_prefix={name}/", "-rss_limit_mb=4096", "-timeout=20", str(corpus)]  # fmt: skip
            done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
            status = [line for line in done.stderr.splitlines() if line.startswith(("Done ", "DONE", "#"))]
            print(f"{reader}: {status[-1] if status else ''} {'no crash' if done.returncode == 0 else 'CRASH'}")
            if done.returncode:
                failed += 1
                print(done.stderr[-3000:] + done.stdout[-2000:])
                for path in folder.glob("crash-*"):
                    print(path.name, path.read_bytes()[:2000])
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reader"]:
        fuzz(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
