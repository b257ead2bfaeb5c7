"""The example notebook runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.server

NOTEBOOKS = Path(__file__).parent.parent.parent / "examples" / "notebooks"


def test_there_is_one_notebook_and_it_is_committed_without_outputs() -> None:
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert [p.name for p in paths] == ["finetune.ipynb"]
    for cell in nbformat.read(paths[0], as_version=4).cells:
        assert cell.get("outputs", []) == []


def test_finetune(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_NOTEBOOK_MODEL", str(tiny_llama))
    notebook = nbformat.read(NOTEBOOKS / "finetune.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [_text(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert "'done'" in shown[2]
    assert "loss" in shown[3]
    assert "after:" in shown[4]
    assert "13" in shown[5]  # the line of the bad row
    result = json.loads((tmp_path / "runs" / "capitals" / "result.json").read_text())
    assert (result["status"], len(result["samples"])) == ("done", 2)


def test_progress_is_one_line_that_is_rewritten(tmp_path: Path) -> None:
    source = (
        "from llmkit.progress import Notebook, open_progress\nimport time\n"
        "with open_progress() as shown:\n"
        "    assert isinstance(shown, Notebook)\n"
        "    for step in range(1, 21):\n        time.sleep(0.1)\n        shown.step(step, 20, {'loss': 1.0})\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs
    assert len(outputs) == 1
    assert "step 20/20" in outputs[0]["data"]["text/plain"]


def _text(cell: Any) -> str:
    outputs = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(outputs)
