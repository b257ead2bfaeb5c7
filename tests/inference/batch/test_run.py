"""A batch job from rows to shards: order, equal rows, bad rows, resuming, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.context import Progress, RunContext, StopFlag
from llmkit.errors import DataError, StoppedEarly, UsageError
from llmkit.inference.batch import work as works
from llmkit.inference.batch.run import BatchReport, run_batch
from llmkit.inference.batch.settings import BatchRecipe
from llmkit.progress import open_progress
from llmkit.tracking import NullTracker

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def upper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(works.WORKS, "upper", "upper_work:UpperWork")
    monkeypatch.setattr("llmkit.inference.batch.run.Ahead.submit", _here)


def _here(self: Any, rows: Any) -> Any:
    """Prepared in this process: test_ahead.py and the integration tests have the other one."""
    from concurrent.futures import Future

    future: Future[Any] = Future()
    future.set_result(self._own.prepare(rows))
    return future


def job(
    folder: Path, rows: Rows | None = None, *, stop: StopFlag | None = None, **keys: Any
) -> tuple[BatchRecipe, RunContext]:
    source = folder / "rows.jsonl"
    if rows is not None:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out"
    out.mkdir(exist_ok=True)
    given_keys = {
        "name": "x",
        "output_dir": str(out),
        "input": {"path": str(source)},
        "output": {"rows_per_shard": 3},
    } | keys
    progress: Progress
    with open_progress() as progress:
        pass
    return BatchRecipe.model_validate(given_keys), RunContext(out, NullTracker(), progress, stop or StopFlag())


def run(folder: Path, rows: Rows | None = None, **keys: Any) -> BatchReport:
    return run_batch(*job(folder, rows, **keys), "upper")


def output(report: BatchReport) -> Rows:
    found: Rows = pa.concat_tables([pq.read_table(path) for path in report.shards]).to_pylist()
    return found


def texts(*values: Any) -> Rows:
    return [{"text": value, "n": i} for i, value in enumerate(values)]


def test_rows_come_out_in_their_order_with_what_they_had(tmp_path: Path) -> None:
    report = run(tmp_path, texts("a", "bb", "c", "dd", "e"))
    assert [(row["n"], row["text"], row["upper"]) for row in output(report)] == [
        (0, "a", "A"), (1, "bb", "BB"), (2, "c", "C"), (3, "dd", "DD"), (4, "e", "E"),
    ]  # fmt: skip
    assert output(report)[0]["vector"] == [1.0, 1.0]
    assert [path.name for path in report.shards] == ["part-00000.parquet", "part-00001.parquet"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["rows"] == 5
    assert manifest["identity"]["work"] == "1"
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 2]


def test_equal_rows_are_computed_once_within_the_window(tmp_path: Path) -> None:
    report = run(tmp_path, texts("a", "a", "b", "b", "c", "a", "a", "c"))
    assert [row["upper"] for row in output(report)] == list("AABBCAAC")
    assert (tmp_path / "computed.txt").read_text().split() == ["a", "b", "c"]
    assert report.metrics["duplicates"] == 5


def test_bad_rows_are_kept_with_their_reason_and_equal_ones_fail_alike(tmp_path: Path) -> None:
    report = run(
        tmp_path,
        [*texts("a", None, "bad", "long", "bad", "b"), {"text": "c", "n": "six"}, {"text": "d", "n": 7, "new": 1}],
    )
    assert [row["upper"] for row in output(report)] == ["A", "B"]
    errors = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert [error["row"].rpartition(":")[2] for error in errors] == ["2", "3", "5", "7", "8"]
    assert errors[0]["reason"] == "no text"
    assert errors[2]["reason"] == "cannot be capital"
    assert "'n' is int64 in the first rows, here it is str" in errors[3]["reason"]
    assert "'new' is not in the first rows" in errors[4]["reason"]
    assert (report.metrics["errors"], report.metrics["dropped"], report.metrics["rows_read"]) == (5, 1, 8)


def test_too_many_bad_rows_end_the_job_and_a_higher_limit_goes_on(tmp_path: Path) -> None:
    rows = texts("a", "b", "c", "bad", "d", "bad2", "bad", "e")
    with pytest.raises(
        DataError, match=r"2 rows failed, max_errors is 1. The first:\n.*rows.jsonl:4: cannot be capital"
    ):
        run(tmp_path, rows, max_errors=1)
    before = (tmp_path / "computed.txt").read_text()
    report = run(tmp_path, max_errors=2)
    assert [row["upper"] for row in output(report)] == ["A", "B", "C", "D", "BAD2", "E"]
    assert not (tmp_path / "computed.txt").read_text().removeprefix(before).startswith("a"), "it went on"


def test_columns_are_chosen_and_rows_named(tmp_path: Path) -> None:
    report = run(
        tmp_path, texts("a"), input={"path": str(tmp_path / "rows.jsonl"), "keep": ["n"]}, output={"row_id": "from"}
    )
    assert list(output(report)[0]) == ["n", "from", "upper", "vector"]
    assert output(report)[0]["from"].endswith("rows.jsonl:1")


@pytest.mark.parametrize(
    ("rows", "keep", "said"),
    [
        ([{"text": "a", "upper": 1}], None, "the column 'upper' would be in the output twice"),
        ([{"text": "a"}], ["id"], "no row has a column 'id'; there are text"),
    ],
)
def test_columns_that_cannot_be_are_refused(tmp_path: Path, rows: Rows, keep: list[str] | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        run(tmp_path, rows, input={"path": str(tmp_path / "rows.jsonl"), "keep": keep})


def test_an_empty_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        run(tmp_path, [])


def test_a_signal_stops_after_a_shard_and_the_job_goes_on(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.request("SIGTERM")
    with pytest.raises(StoppedEarly, match="after shard 0"):
        run_batch(*job(tmp_path, texts(*"abcdefg"), stop=stop), "upper")
    assert [row["upper"] for row in output(run(tmp_path))] == list("ABCDEFG")
    assert (tmp_path / "computed.txt").read_text().split() == list("abcdefg")


def test_a_damaged_shard_is_made_anew(tmp_path: Path) -> None:
    first = run(tmp_path, texts(*"abcabcdefabc"))
    before = [path.read_bytes() for path in first.shards]
    first.shards[1].write_bytes(before[1][:-20])
    again = run(tmp_path)
    assert [path.read_bytes() for path in again.shards] == before


def test_another_work_does_not_go_on_with_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, texts("a"))
    monkeypatch.setenv("UPPER_VERSION", "2")
    with pytest.raises(UsageError, match="holds shards of another job: work changed"):
        run(tmp_path)


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    recipe, _ = job(tmp_path, input={"path": [str(tmp_path / "rows.jsonl"), str(tmp_path / "*.jsonl")]})
    with pytest.raises(DataError, match="more than once"):
        recipe.input_digests()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.sampled_from(["a", "b", "c", "bad", "long", None, "dd", "eee"]), min_size=1, max_size=40),
    size=st.integers(1, 7), cut=st.integers(0, 12), half=st.binary(max_size=40),
)  # fmt: skip
def test_whatever_is_lost_the_output_is_that_of_a_job_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, values: list[str | None], size: int, cut: int, half: bytes
) -> None:
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    keys: dict[str, Any] = {"output": {"rows_per_shard": size}, "max_errors": 100}
    expected = run(whole, texts(*values), **keys)
    run(broken, texts(*values), **keys)
    journal = broken / "out" / "shards.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: 1 + cut]) + (half.replace(b"\n", b"") if cut < len(lines) - 1 else b""))
    (broken / "out" / "shards" / ".part-00000.parquet").write_bytes(half)
    again = run(broken, **keys)
    assert [path.read_bytes() for path in again.shards] == [path.read_bytes() for path in expected.shards]
    bad = broken / "out" / "errors.jsonl", whole / "out" / "errors.jsonl"
    assert bad[0].exists() == bad[1].exists()
    assert not bad[0].exists() or bad[0].read_text().replace(str(broken), str(whole)) == bad[1].read_text()


@pytest.mark.parametrize("damaged", [0, 2, 9])
def test_a_damaged_shard_is_made_anew_though_all_later_ones_are_there(tmp_path: Path, damaged: int) -> None:
    """Its rows equal those of shards long before the end, which must still be at hand when its turn comes."""
    report = run(tmp_path, texts(*"abcabcabdabeabfabgabhabiabjabk"))
    before = [path.read_bytes() for path in report.shards]
    assert len(before) == 10
    report.shards[damaged].write_bytes(before[damaged][:-9])
    (tmp_path / "computed.txt").unlink()
    again = run(tmp_path)
    assert [path.read_bytes() for path in again.shards] == before
    computed = (tmp_path / "computed.txt").read_text().split() if (tmp_path / "computed.txt").exists() else []
    assert len(computed) <= 3
