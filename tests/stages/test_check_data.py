"""``llmkit check-data`` on recipes of other stages: report, exit code, folder of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmkit
from llmkit.cli import main
from llmkit.errors import DataError

SENTENCE = "The parcel number {} is on its way to you and it will be there in {} days."
RECIPE = """
name: shop
output_dir: {folder}/runs/shop
model: {{name_or_path: {folder}/model}}
data:
  train: {folder}/data/train.jsonl
  eval: {folder}/data/test.jsonl
{more}
train: {{max_steps: 2}}
tracking: {{enabled: false}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """A recipe for lora or sft over 80 rows; 9 is equal to 5, and with ``leak`` 31 is test row 2. The data are MIT."""

    def make(more: str = "", leak: bool = True) -> Path:
        rows = [
            {"prompt": f"Where is my parcel {n} of {n * n}?", "completion": SENTENCE.format(n, n % 9)}
            for n in range(95)
        ]
        train, test = rows[:80], rows[80:]
        train[8] = train[4]
        if leak:
            train[30] = test[1]
        (tmp_path / "data").mkdir(exist_ok=True)
        for name, some in (("train", train), ("test", test)):
            (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        (tmp_path / "data" / "README.md").write_text("---\nlicense: mit\n---\n")
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(folder=tmp_path, more=more), encoding="utf-8")
        return path

    return make


def test_a_leak_is_exit_code_3_and_the_report_is_there(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-data", str(recipe("adapter: {r: 4}", leak=True))]) == 3
    told = capsys.readouterr().err
    folder = tmp_path / "runs" / "shop-check-data"
    assert "train.jsonl:31" in told and "test.jsonl:2" in told and str(folder / "guard_report.html") in told
    report = json.loads((folder / "guard_report.json").read_text(encoding="utf-8"))
    assert report["leaks"]["rows"] == 1 and report["duplicates"]["exact"]["rows"] == 1
    assert report["problems"] and len(report["licences"]) == 3
    assert not (tmp_path / "runs" / "shop").exists(), "the folder of the training run is left alone"
    assert not (folder / "work").exists()
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"


def test_a_report_in_three_forms(recipe: Any, tmp_path: Path) -> None:
    result = llmkit.check_data(recipe(), {"data.guard": {"leaks": {"action": "report"}}})
    assert result.stage == "check-data" and result.exit_code == 0
    assert result.metrics["guard_rows"] == 80 and result.metrics["guard_leaks"] == 1
    assert result.metrics["guard_exact_duplicates"] == 1 and result.metrics["guard_dropped"] == 0
    folder = result.output_dir
    assert set(result.artifacts.values()) == {path.name for path in folder.glob("guard_*")}
    markdown = (folder / "guard_report.md").read_text(encoding="utf-8")
    page = (folder / "guard_report.html").read_text(encoding="utf-8")
    for text in (markdown, page):
        assert "train.jsonl:31" in text and "exact duplicates" in text and "MIT" in text
    assert 'src="data:image/png;base64,' in page and "http" not in page
    assert "![guard_lengths.png](guard_lengths.png)" in markdown


def test_without_findings_of_error_it_is_fine_and_a_changed_recipe_starts_over(recipe: Any, tmp_path: Path) -> None:
    path = recipe(leak=False)
    assert main(["check-data", str(path)]) == 0
    assert main(["check-data", str(path), "data.guard.duplicates.action=error"]) == 3
    assert (tmp_path / "runs" / "shop-check-data.1").is_dir(), "the first report is kept"
    assert main(["check-data", str(path), "--output-dir", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "guard_report.json").is_file()


def test_licences_are_held_against_the_recipe(recipe: Any) -> None:
    more = "  guard: {allow_licenses: [MIT], leaks: {action: report}}"
    with pytest.raises(DataError, match=r"model\.name_or_path.*unknown") as refusal:
        llmkit.check_data(recipe(more))
    assert "data.train" not in str(refusal.value)
    folder = recipe(more).parent / "model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert llmkit.check_data(recipe(more)).metrics["guard_rows"] == 80


def test_documents_are_checked_too(recipe: Any, tmp_path: Path) -> None:
    path = recipe()
    text = tmp_path / "data" / "book.txt"
    text.write_text("A book about parcels. " + SENTENCE.format(1, 2) * 3, encoding="utf-8")
    found = llmkit.check_data(path, {"data.train": str(text), "data.eval": None, "data.format": "text"})
    assert found.metrics["guard_rows"] == 1


def test_rows_that_training_would_refuse_are_exit_code_3(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe("launch: {processes: 2}", leak=False)
    rows = path.parent / "data" / "train.jsonl"
    rows.write_text(rows.read_text() + '{"prompt": "x"}\n')
    change = "data.format=prompt_completion"
    assert main(["check-data", str(path), change, "launch.processes=1"]) == 3
    assert "train.jsonl:81" in capsys.readouterr().err
    assert main(["check-data", str(path), change, "launch.processes=1", "data.on_bad_row=drop"]) == 0


def test_dry_run_shows_the_folder_of_its_own(recipe: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check-data", str(recipe()), "--dry-run"]) == 0
    assert str(tmp_path / "runs" / "shop-check-data") in capsys.readouterr().err
