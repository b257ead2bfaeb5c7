"""The log on disk: whole lines, a half line after ``kill -9``, values that JSON does not have."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from llmkit.errors import UsageError
from llmkit.tracking.spool import LOG_NAME, Spool, read, read_metrics, repair
from llmkit.tracking.state import SendLock, State, load_state


def test_events_come_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write("params", {"params": {"a": "é\ud800"}})
    spool.write("metrics", {"step": 3, "metrics": {"nan": math.nan, "up": math.inf, "down": -math.inf, "x": 0.1}})
    assert spool.close() == 0
    first, second = read(tmp_path / LOG_NAME)
    assert (first.kind, first.start, second.start, second.end) == (
        "params",
        0,
        first.end,
        (tmp_path / LOG_NAME).stat().st_size,
    )
    assert list(read(tmp_path / LOG_NAME, first.end)) == [second]
    ((step, time_ms, metrics),) = read_metrics(tmp_path)
    assert step == 3 and time_ms == second.time_ms > 1.7e12
    assert math.isnan(metrics.pop("nan")) and metrics == {"up": math.inf, "down": -math.inf, "x": 0.1}
    for line in (tmp_path / LOG_NAME).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no strict JSON"))


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_half_line_costs_itself_only(tmp_path: Path, cut: int) -> None:
    log = tmp_path / LOG_NAME
    spool = Spool(tmp_path)
    for step in range(3):
        spool.write("metrics", {"step": step, "metrics": {"a": 1.0}})
    spool.close()
    log.write_bytes(log.read_bytes()[:-cut])
    assert [e.body["step"] for e in read(log)] == [0, 1]
    again = Spool(tmp_path)
    again.write("metrics", {"step": 9, "metrics": {"a": 1.0}})
    again.close()
    steps = [step for step, _, _ in read_metrics(tmp_path)]
    assert steps == ([0, 1, 2, 9] if cut == 1 else [0, 1, 9])
    assert sum(e.kind == "damaged" for e in read(log)) == (cut > 1)


def test_repair_of_nothing(tmp_path: Path) -> None:
    assert not repair(tmp_path / LOG_NAME)
    (tmp_path / LOG_NAME).touch()
    assert not repair(tmp_path / LOG_NAME)


def test_threads_never_mix_lines(tmp_path: Path) -> None:
    spool = Spool(tmp_path)

    def work(number: int) -> None:
        for step in range(200):
            spool.write("metrics", {"step": step, "metrics": {f"m{number}": float(step)}})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spool.close()
    assert len(list(read_metrics(tmp_path))) == 800


def test_a_full_disk_costs_events_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / LOG_NAME
    log.symlink_to("/dev/full")
    spool = Spool(tmp_path)
    spool.write("metrics", {"step": 1, "metrics": {"a": 1.0}})
    spool.write("metrics", {"step": 2, "metrics": {"a": 1.0}})
    assert spool._lost == 2
    assert sum("cannot be written" in message for message in caplog.messages) == 1


def test_state_is_replaced_whole(tmp_path: Path) -> None:
    state = State(sent=12, run_id="r", failed=[{"offset": 1, "what": "w", "reason": "x"}])
    state.save(tmp_path)
    assert load_state(tmp_path) == state
    assert [p.name for p in tmp_path.iterdir()] == ["tracking.json"]
    (tmp_path / "tracking.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        load_state(tmp_path)


def test_one_sender_at_a_time(tmp_path: Path) -> None:
    first, second = SendLock(tmp_path), SendLock(tmp_path)
    assert first.acquire() and first.acquire() and not second.acquire()
    assert second.holder().isdigit()
    first.release()
    assert second.acquire()
    second.release()
