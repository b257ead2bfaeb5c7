"""What the exceptions of other libraries amount to."""

from __future__ import annotations

import errno

import pytest

from llmkit.errors import DataError, ProcessLostError, WontFitError
from llmkit.faults import translate


@pytest.mark.parametrize(
    "exc",
    [
        MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)  # fmt: skip
def test_out_of_memory(exc: Exception) -> None:
    assert isinstance(translate(exc), WontFitError)


GONE = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:40193",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:1: Connection reset by peer",
)


@pytest.mark.parametrize("text", GONE)
def test_another_process_that_is_gone(text: str) -> None:
    known = translate(RuntimeError(text))
    assert isinstance(known, ProcessLostError)
    assert "is gone" in str(known)


def test_another_process_that_does_not_answer() -> None:
    text = "[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete"
    known = translate(RuntimeError(text))
    assert isinstance(known, ProcessLostError)
    assert "launch.timeout_minutes" in str(known)
    store = type("DistStoreError", (RuntimeError,), {})
    assert isinstance(translate(store("wait timeout after 1000ms, keys: /prepared")), ProcessLostError)


def test_others_are_left_alone() -> None:
    for exc in (
        ConnectionResetError("Connection reset by peer"),
        RuntimeError("Connection closed by peer"),
        KeyError("x"),
    ):
        assert translate(exc) is None
    known = DataError("x")
    assert translate(known) is known
