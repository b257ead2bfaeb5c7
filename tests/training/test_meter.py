"""[13]: tokens per second three ways, by the clock of the steps only."""

from __future__ import annotations

import pytest
import torch

from llmkit.training import meter as module
from llmkit.training.batching import Batch, Part
from llmkit.training.meter import Meter, peak_memory


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def batch(supervised: int, tokens: int, positions: int) -> Batch:
    parts = [Part({}, torch.zeros(0), supervised, tokens, positions), Part({}, torch.zeros(0), 0, 1, 2)]
    return Batch(parts, [])


def test_rates_are_named_and_counted_three_ways(clock: Clock) -> None:
    meter = Meter()
    meter.start()
    meter.add(batch(supervised=10, tokens=29, positions=38))
    clock.now += 2
    assert meter.total() == {
        "tokens_per_second": 20.0, "tokens_per_second_non_padding": 15.0, "tokens_per_second_supervised": 5.0,
    }  # fmt: skip


def test_processes_add_up_and_mfu_is_per_process(clock: Clock) -> None:
    meter = Meter(world_size=4, flops_per_token=1e6, peak_flops=1e9)
    meter.start()
    meter.add(batch(10, 29, 38))
    clock.now += 3
    rates = meter.total()
    assert rates["tokens_per_second"] == pytest.approx(4 * 40 / 3)
    assert rates["mfu"] == pytest.approx(30 / 3 * 1e6 / 1e9)
    assert "mfu" not in Meter(flops_per_token=1e6)._rates(1.0, 1, 1, 1)


def test_the_clock_stands_still_in_evaluation_and_saving(clock: Clock) -> None:
    meter = Meter()
    meter.start()
    clock.now += 2
    meter.stop()
    clock.now += 50
    meter.stop()
    assert meter.elapsed == meter.seconds == 2
    meter.start()
    clock.now += 3
    assert meter.elapsed == 5
    assert meter.seconds == 2


def test_starting_a_running_clock_loses_nothing(clock: Clock) -> None:
    """Every step starts it: the time since the last step, in which batches are made, belongs to the run."""
    meter = Meter()
    for _ in range(4):
        meter.start()
        clock.now += 1
    meter.stop()
    assert meter.seconds == 4


def test_rates_since_the_last_line(clock: Clock) -> None:
    meter = Meter()
    assert meter.since_last() == {}
    meter.start()
    meter.add(batch(10, 29, 38))
    clock.now += 1
    assert meter.since_last()["tokens_per_second_non_padding"] == 30
    meter.add(batch(10, 59, 68))
    clock.now += 2
    assert meter.since_last()["tokens_per_second_non_padding"] == 30
    assert meter.total()["tokens_per_second_non_padding"] == 30
    assert meter.since_last() == {}


def test_peak_memory_is_in_bytes() -> None:
    found = peak_memory()
    assert 50e6 < found["peak_memory_host_bytes"] < 1e12
    assert ("peak_memory_device_bytes" in found) == torch.cuda.is_available()
