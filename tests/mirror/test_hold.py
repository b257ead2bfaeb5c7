"""One process at a time in a folder of a store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from dataclasses import replace

import pytest

from llmkit.errors import UsageError
from llmkit.mirror import hold
from llmkit.mirror.hold import LEASE, Claim, Hold, acquire
from llmkit.mirror.store import Store


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, seconds in (("BEAT_S", 0.1), ("LAPSE_S", 0.6), ("_LOOK_S", 0.05), ("_SETTLE_S", 0.0)):
        monkeypatch.setattr(hold, name, seconds)
    return Store(f"memory://{uuid.uuid4().hex}")


def elsewhere(owner: str) -> Claim:
    return replace(Claim.ours(owner), host="another-machine")


def test_a_free_folder_is_taken_and_given_back(store: Store) -> None:
    assert acquire(store, "a") is None
    held = Hold(store, "a", pytest.fail)
    held.release()
    before = acquire(store, "b")
    assert before is not None and before.released and before.owner == "a"


def test_a_second_process_is_refused_while_the_first_shows_itself(store: Store) -> None:
    acquire(store, "a")
    store.write(LEASE, elsewhere("a").to_bytes())
    held = Hold(store, "a", pytest.fail)
    try:
        with pytest.raises(UsageError, match="is working in"):
            acquire(store, "b")
    finally:
        held.release()


def test_a_claim_that_does_not_change_is_taken_over(store: Store) -> None:
    store.write(LEASE, elsewhere("a").to_bytes())
    began = time.monotonic()
    acquire(store, "b")
    assert time.monotonic() - began >= 0.6


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(store: Store) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    store.write(LEASE, replace(Claim.ours("a"), pid=int(gone.stdout)).to_bytes())
    began = time.monotonic()
    acquire(store, "b")
    assert time.monotonic() - began < 0.5


def test_a_process_of_this_machine_that_lives_is_waited_for(store: Store) -> None:
    store.write(LEASE, replace(Claim.ours("a"), pid=os.getppid()).to_bytes())
    began = time.monotonic()
    acquire(store, "b")
    assert time.monotonic() - began >= 0.6


def test_whoever_was_taken_over_learns_it(store: Store) -> None:
    lost: list[str] = []
    acquire(store, "a")
    held = Hold(store, "a", lost.append)
    store.write(LEASE, elsewhere("b").to_bytes())
    end = time.monotonic() + 5
    while not lost and time.monotonic() < end:
        time.sleep(0.05)
    held.release()
    assert "taken over" in lost[0] and "another-machine" in lost[0]
    found = Claim.read(store)
    assert found is not None and found.owner == "b" and not found.released
