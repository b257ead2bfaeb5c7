"""Resuming [16], damaged checkpoints [15], other numbers of processes [17], stopping [19]; several processes [11]."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import (
    assert_close,
    assert_identical,
    history,
    logged,
    overfitting,
    recipe,
    run,
    weights,
)

from llmkit import api, runner
from llmkit.errors import StoppedEarly, UsageError

# Resuming


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """A real signal to this process while it is in the given step."""
    from llmkit.training.trainer import LlmkitTrainer

    real = LlmkitTrainer.training_step
    sent = []

    def step_with_signal(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step and not sent:
            sent.append(os.kill(os.getpid(), number))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlmkitTrainer, "training_step", step_with_signal)


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "accumulated": ("sft", {"train.gradient_accumulation_steps": 2, "train.per_device_train_batch_size": 2}),
    "packed": ("sft", {"data.packing": True, "train.per_device_train_batch_size": 1, "train.max_steps": 12}),
    "lora with dropout": ("lora", {"adapter.lora_dropout": 0.3, "adapter.r": 4}),
    "qlora": ("lora", {"model.quantization": "nf4", "adapter.r": 4}),
    "neftune": ("sft", {"train.neftune_noise_alpha": 5.0}),
    "streaming": ("sft", {"data.streaming": True, "train.max_steps": 12}),
    "evaluating": ("sft", {"data.eval": {"split": 0.3}, "train.eval_steps": 2, "train.max_steps": 12}),
    "sgd": ("sft", {"train.optim": "sgd"}),
}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", WAYS)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[16], bit for bit: stopped in the middle of an epoch (step 3), at its end (6) and in the next (8)."""
    stage, changed = WAYS[name]
    base = recipe(tmp_path, tiny_llama)
    run(base, "whole", stage, **{k.replace(".", "__"): v for k, v in changed.items()})
    total = len(history(tmp_path / "whole"))
    assert total == 12
    for step in (3, 6, 8):
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            with pytest.raises(StoppedEarly, match=f"SIGTERM after step {step} of 12"):
                run(base, "parts", stage, **{k.replace(".", "__"): v for k, v in changed.items()})
        assert max(history(tmp_path / "parts")) == step
    result = run(base, "parts", stage, **{k.replace(".", "__"): v for k, v in changed.items()})
    assert result.metrics["steps"] == 12
    assert_identical(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert history(tmp_path / "parts", key) == history(tmp_path / "whole", key)


@pytest.mark.usefixtures("fast")
def test_early_stopping_goes_on_counting(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = overfitting(tmp_path, tiny_llama, early_stopping_patience=3)
    assert run(base, "whole").metrics["steps"] < 120
    losses = logged(tmp_path / "whole", "eval_loss")
    best = min(losses, key=lambda s: losses[s])
    steps = best + 6
    for step in (best + 3, steps - 1):
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            with pytest.raises(StoppedEarly):
                run(base, "parts")
    result = run(base, "parts")
    assert result.metrics["steps"] == steps
    assert_identical(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.usefixtures("fast")
def test_a_run_that_had_stopped_early_does_not_train_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after early stopping and before the export: the next start has nothing left to train."""
    base = overfitting(tmp_path, tiny_llama, early_stopping_patience=1)
    whole = run(base, "whole")
    assert whole.metrics["steps"] == 4 == max(history(tmp_path / "whole")), "it must stop where it saves"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llmkit.training.run.export", _interrupt)
        run(base, "parts")
    assert run(base, "parts").metrics["steps"] == 4
    assert_identical(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.usefixtures("fast")
def test_a_time_limit_stops_again_and_again_until_the_run_is_done(tiny_llama: Path, tmp_path: Path) -> None:
    base = recipe(tmp_path, tiny_llama, max_steps=4)
    run(base, "whole")
    for step in (1, 2, 3):
        with pytest.raises(StoppedEarly, match=f"time limit of the recipe after step {step} of 4") as caught:
            run(base, "parts", train__time_limit_minutes=1e-9)
        assert caught.value.exit_code == 138
        found = json.loads((tmp_path / "parts" / "result.json").read_text())
        assert (found["status"], found["exit_code"]) == ("stopped", 138)
    run(base, "parts", train__time_limit_minutes=1e-9)
    assert_identical(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.usefixtures("fast")
def test_minutes_between_checkpoints(tiny_llama: Path, tmp_path: Path) -> None:
    run(recipe(tmp_path, tiny_llama, max_steps=4, save_minutes=1e-9), "out")
    assert len(list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))) == 4


@pytest.mark.usefixtures("fast")
def test_a_damaged_checkpoint_is_passed_over(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """[15]: the one before it is taken, the line says why, and the end is the same."""
    base = recipe(tmp_path, tiny_llama, save_steps=3)
    run(base, "whole")
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        with pytest.raises(StoppedEarly):
            run(base, "parts")
    damaged = tmp_path / "parts" / "checkpoints" / "checkpoint-8" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    capfd.readouterr()
    run(base, "parts")
    told = capfd.readouterr().err
    assert "checkpoint-8 is not complete (optimizer.pt has " in told
    assert "checkpoint-6" in told
    assert_identical(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.usefixtures("fast")
def test_killed_after_the_last_step_only_the_export_is_left(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = recipe(tmp_path, tiny_llama)
    run(base, "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llmkit.training.run.export", _interrupt)
        run(base, "parts")
    result = run(base, "parts")
    assert result.metrics["steps"] == 12
    assert_identical(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("fast")
def test_a_named_checkpoint_is_gone_on_from(tiny_llama: Path, tmp_path: Path) -> None:
    base = recipe(tmp_path, tiny_llama, save_steps=5)
    run(base, "whole")
    result = api.run(
        "sft", base, output_dir=tmp_path / "other", resume=str(tmp_path / "whole" / "checkpoints" / "checkpoint-5")
    )
    assert result.metrics["steps"] == 12
    assert_identical(weights(tmp_path / "other"), weights(tmp_path / "whole"))
    with pytest.raises(UsageError, match="not a complete checkpoint"):
        api.run("sft", base, output_dir=tmp_path / "third", resume=str(tmp_path / "whole" / "checkpoints"))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("world_size", 2, r"written by 2 process\(es\).*this run has\s+1"), ("data", "xyz", "other data")],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_reason(
    key: str, value: Any, message: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[17]"""
    base = recipe(tmp_path, tiny_llama)
    stop_after(3, monkeypatch)
    with pytest.raises(StoppedEarly):
        run(base, "out")
    manifest = tmp_path / "out" / "checkpoints" / "checkpoint-3" / "llmkit_checkpoint.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=f"(?s){message}"):
        run(base, "out")


# Processes of their own


def frozen(base: dict[str, Any], name: str) -> Path:
    """``OUT/recipe.yaml``, as a launcher makes it."""
    resolved = api.resolve("sft", base, output_dir=Path(base["output_dir"]).with_name(name))
    return runner.prepare(resolved, "sft").folder / "recipe.yaml"


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "200"} | more


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_the_retry_code(
    number: signal.Signals, tiny_llama: Path, tmp_path: Path
) -> None:
    """[19]: the same command then finishes, and the weights are those of a run that was left alone."""
    base = recipe(tmp_path, tiny_llama, max_steps=150, save_steps=1000)
    command = [sys.executable, "-m", "llmkit", "run", str(frozen(base, "parts"))]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment())
    seen = read_until(process, "step 3/150")
    process.send_signal(number)
    seen += process.communicate(timeout=120)[1]
    assert process.returncode == 138, seen
    (kept,) = (tmp_path / "parts" / "checkpoints").glob("checkpoint-*")
    step = int(kept.name.split("-")[1])
    assert 3 <= step < 150
    assert f"Stopped by {number.name} after step {step} of 150" in seen
    assert "Traceback" not in seen
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment())
    assert done.returncode == 0, done.stderr
    assert f"Going on from {kept}" in done.stderr
    run(base, "whole")  # in this very process
    assert_identical(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def read_until(process: subprocess.Popen[str], text: str, seconds: float = 200) -> str:
    assert process.stderr is not None
    seen, limit = "", time.monotonic() + seconds
    while text not in seen:
        line = process.stderr.readline()
        assert line, f"it ended too early: {seen}"
        assert time.monotonic() < limit, seen
        seen += line
    return seen


Ranks = list[subprocess.Popen[str]]


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[[Path], Ranks]:
    """Start a frozen recipe as two processes, as torchrun would."""

    def start(path: Path) -> Ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        return [
            subprocess.Popen(
                [sys.executable, "-m", "llmkit", "run", str(path)], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                env=environment(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                                MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            )
            for r in (0, 1)
        ]  # fmt: skip

    return start


def test_two_processes_do_what_one_does(tiny_llama: Path, tmp_path: Path) -> None:
    """[11]: torchrun with two processes of 2 rows gives the curve and the weights of one with 4.

    21 rows: in the last step of an epoch the second process has none.
    """
    one = recipe(tmp_path, tiny_llama, optim="sgd", learning_rate=0.5, data={"eval": {"split": 0.2}}, eval_steps=2)
    two = one | {"train": one["train"] | {"per_device_train_batch_size": 2}}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "-m", "llmkit", "run", str(frozen(two, "two")),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, env=environment())
    assert done.returncode == 0, done.stderr
    alone = [sys.executable, "-m", "llmkit", "run", str(frozen(one, "one"))]
    done = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True, timeout=280, env=environment())
    assert done.returncode == 0, done.stderr
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        assert history(tmp_path / "two", key) == pytest.approx(history(tmp_path / "one", key), rel=1e-4), key
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), 2e-5)


def test_a_signal_to_one_of_two_processes_stops_both_and_they_go_on(
    tiny_llama: Path, tmp_path: Path, two_ranks: Callable[[Path], Ranks]
) -> None:
    """[19], every rank takes part; [17], one process alone is refused; [16], two go on, bit for bit."""
    base = recipe(tmp_path, tiny_llama, max_steps=60, per_device_train_batch_size=2, save_steps=1000)
    first = two_ranks(frozen(base, "parts"))
    try:
        seen = read_until(first[0], "step 3/60")
        first[1].send_signal(signal.SIGTERM)
        ends = [p.communicate(timeout=120)[1] for p in first]
    finally:
        for process in first:
            process.kill()
    assert [p.returncode for p in first] == [138, 138], (seen, ends)
    (kept,) = (tmp_path / "parts" / "checkpoints").glob("checkpoint-*")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in kept.iterdir()}

    alone = [sys.executable, "-m", "llmkit", "run", str(tmp_path / "parts" / "recipe.yaml")]
    refused = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment())
    assert refused.returncode == 2, refused.stderr
    assert "written by 2 process(es) with 4 sequences a step" in " ".join(refused.stderr.split())

    for name in ("parts", "whole"):
        ranks = two_ranks(tmp_path / name / "recipe.yaml" if name == "parts" else frozen(base, name))
        ends = [p.communicate(timeout=200)[1] for p in ranks]
        assert [p.returncode for p in ranks] == [0, 0], ends
    assert_identical(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
