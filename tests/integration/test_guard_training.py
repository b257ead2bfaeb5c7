"""The guard in a training run: the same rows for every start, licences as tags, an error before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import SUMS, assert_identical, recipe, run, weights

from llmkit.errors import DataError

GUARD = {"duplicates": {"action": "drop", "near": None}, "quality": None}


def guarded(folder: Path, model: Path, guard: dict[str, Any], **data: Any) -> dict[str, Any]:
    """The 21 sums, the first three of them twice, and a held-out one; the data are CC-BY-4.0."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*SUMS, *SUMS[:3]]))
    test = folder / "test"
    test.mkdir(exist_ok=True)
    (test / "rows.jsonl").write_text(json.dumps({"prompt": "What is 70 + 7?", "completion": "77"}) + "\n")
    for place in (folder, test):
        (place / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    return recipe(folder, model, data={"eval": str(test / "rows.jsonl"), "guard": guard} | data, max_steps=3)


@pytest.mark.usefixtures("fast")
def test_a_guarded_run_trains_on_the_rows_that_are_left(tiny_llama: Path, tmp_path: Path) -> None:
    plain = recipe(tmp_path, tiny_llama, data={"eval": None}, max_steps=3)
    run(plain, "plain")
    what = guarded(tmp_path, tiny_llama, GUARD)
    result = run(what, "guarded", data__eval=None)
    report = json.loads((tmp_path / "guarded" / "data_report.json").read_text())
    assert report["train"]["rows"] == 21 and report["guard"]["dropped"]["by"] == {"exact_duplicates": 3}
    assert result.status == "done"
    assert_identical(weights(tmp_path / "plain"), weights(tmp_path / "guarded"))
    events = (tmp_path / "guarded" / "log.jsonl").read_text()
    assert '"guard_exact_duplicates": 3.0' in events
    assert "CC-BY-4.0" in events, "the licence of the data is tracked"


def test_leaks_and_licences_stop_the_run_before_it_trains(tiny_llama: Path, tmp_path: Path) -> None:
    what = guarded(tmp_path, tiny_llama, {"allow_licenses": ["MIT"]})
    with pytest.raises(DataError, match=r"CC-BY-4\.0"):
        run(what, "licence")
    what = guarded(tmp_path, tiny_llama, {}, eval=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="evaluation or test sets"):
        run(what, "leak")
    assert not (tmp_path / "leak" / "checkpoints").exists()
    assert (tmp_path / "leak" / "guard_rows.jsonl").is_file()
