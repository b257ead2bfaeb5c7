"""The text after a stage: before and after, samples, what to do next."""

from __future__ import annotations

from pathlib import Path

from llmkit.context import Result
from llmkit.summary import ANSWER_WIDTH, paired, shorten, summary


def test_numbers_measured_twice_stand_side_by_side() -> None:
    assert list(paired({"eval_loss_before": 2.0, "eval_loss_after": 1.0, "steps": 3})) == [
        ("eval_loss", "eval_loss_before", "eval_loss_after")
    ]
    assert list(paired({"eval_loss_before": 2.0})) == []
    result = Result("sft", "x", Path("out"), metrics={"eval_loss_before": 2.0, "eval_loss_after": 1.25, "steps": 3})
    assert "  eval_loss: 2 → 1.25\n  steps: 3" in summary(result)


def test_bytes_and_seconds_are_readable() -> None:
    metrics = {"peak_memory_host_bytes": 3.6 * 2**30, "train_seconds": 187.0, "load_seconds": 1.5}
    text = summary(Result("sft", "x", Path("out"), metrics=metrics))
    assert "peak_memory_host_bytes: 3.60 GB" in text
    assert "train_seconds: 3m07s" in text
    assert "load_seconds: 1.5" in text


def test_a_long_answer_is_shortened_and_says_so() -> None:
    assert shorten("a\n b") == "a b"
    cut = shorten("word " * 200)
    assert cut.endswith("(999 characters)")
    assert len(cut) < ANSWER_WIDTH + 30


def test_next_steps(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    (folder / "adapter").mkdir(parents=True)
    text = summary(Result("lora", "x", folder))
    assert f"llmkit chat '{folder}'" in text
    assert "MLflow" not in text
    (folder / "recipe.yaml").write_text("tracking: {uri: 'http://tracker:5000'}\n")
    assert "open http://tracker:5000" in summary(Result("lora", "x", folder, run_id="abc"))
    assert "llmkit chat" not in summary(Result("lora", "x", tmp_path))
