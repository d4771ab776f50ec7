"""The notebooks run in a kernel of their own, on less than they show."""

from pathlib import Path

import nbformat
import pytest
import ultralytics
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
YOLO26 = list(Path(ultralytics.__file__).parent.rglob("yolo26.yaml"))
SMALLER = {
    "neck_in_yolo": {
        "BASE": "yolo26n" if YOLO26 else "yolo11n",
        "IMAGES": 16,
        "SIZE": 64,
        "EPOCHS": {"base": 1, "neck": 1},
    },
}


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    shown = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in shown), "it is kept with its outputs"
    assert all(output.output_type != "error" for cell in shown for output in cell.outputs)

    (parameters,) = [cell for cell in shown if "parameters" in cell.metadata.get("tags", [])]
    names = {line.split("=")[0].strip() for line in parameters.source.splitlines()}
    assert names == {"BASE", "IMAGES, SIZE", "EPOCHS"}
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in SMALLER[path.stem].items())
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in shown for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert "largest difference of the outputs: 0.0" in "".join(output.get("text", "") for output in outputs)
