"""The notebooks run in a kernel of their own, on less than they show."""

from pathlib import Path

import nbformat
import pytest
import ultralytics
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
YOLO26 = list(Path(ultralytics.__file__).parent.rglob("yolo26.yaml"))
# Of each: its parameters, made small; how many pictures it shows; what it says.
SMALLER = {
    "attention": ({"TRAIN, SIZE": (32, 64), "EPOCHS": 1}, 3, "sums 1.000000 to 1.000000"),
    "granularities": ({"CHANNELS, SIZES": (16, [8, 16]), "VIEW": 16}, 2, ""),
    "neck_in_yolo": (
        {
            "BASE": "yolo26n" if YOLO26 else "yolo11n",
            "IMAGES, SIZE": (16, 64),
            "EPOCHS": {"base": 1, "neck": 1},
        },
        2,
        "largest difference of the outputs: 0.0",
    ),
    "quickstart": ({"TRAIN, SIZE": (32, 64), "EPOCHS": 1}, 1, "changed by 0.0"),
}


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    shown = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in shown), "it is kept with its outputs"
    assert all(output.output_type != "error" for cell in shown for output in cell.outputs)
    streams = {output.name for cell in shown for output in cell.outputs if output.output_type == "stream"}
    assert "stderr" not in streams, "warnings name the machine that it ran on"

    smaller, pictures, told = SMALLER[path.stem]
    (parameters,) = [cell for cell in shown if "parameters" in cell.metadata.get("tags", [])]
    assert {line.split("=")[0].strip() for line in parameters.source.splitlines()} == smaller.keys()
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in smaller.items())
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in shown for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert told in "".join(output.get("text", "") for output in outputs)
