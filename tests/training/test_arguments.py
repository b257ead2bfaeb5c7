"""The recipe's settings reach transformers; none of them is dead."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

import llmkit
from llmkit.data.settings import DataSettings, SourceSettings
from llmkit.errors import MissingError
from llmkit.modeling.settings import AdapterSettings, ModelSettings, TokenizerTrainingSettings
from llmkit.recipe import Settings
from llmkit.training.arguments import SAME_NAME, total_steps, training_arguments
from llmkit.training.settings import TrainSettings

PACKAGE = Path(llmkit.__file__).parent


def attributes_read(folders: list[str]) -> set[str]:
    """Names after a dot in the code (settings files, which only declare and compare, aside)."""
    found: set[str] = set()
    files = 0
    for folder in folders:
        for path in sorted((PACKAGE / folder).glob("*.py")):
            if path.name == "settings.py":
                continue
            files += 1
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert files > 5
    return found


@pytest.mark.parametrize(
    ("kind", "folders"),
    [
        (TrainSettings, ["training"]),
        (DataSettings, ["data", "training"]),
        (SourceSettings, ["data", "modeling"]),
        (ModelSettings, ["modeling", "training"]),
        (TokenizerTrainingSettings, ["modeling"]),
        (AdapterSettings, ["modeling"]),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_no_setting_is_dead(kind: type[Settings], folders: list[str]) -> None:
    """[25]: a key that the recipe takes is a key that something reads."""
    read = attributes_read(folders)
    if kind is TrainSettings:
        assert set(SAME_NAME) <= set(TrainSettings.model_fields)
        read |= set(SAME_NAME)
    if kind is AdapterSettings:
        read |= _passed_on_whole(kind)
    dead = [name for name in kind.model_fields if name not in read]
    assert not dead, f"read nowhere in llmkit/{', llmkit/'.join(folders)}: {dead}"


def _passed_on_whole(kind: type[Settings]) -> set[str]:
    """The adapter's settings may go to PEFT as a dictionary: then all of them are PEFT's own names."""
    text = (PACKAGE / "modeling" / "adapters.py").read_text(encoding="utf-8")
    if "model_dump" not in text:
        return set()
    import inspect

    from peft import LoraConfig

    return set(kind.model_fields) & set(inspect.signature(LoraConfig).parameters)


def test_settings_arrive_under_their_names(tmp_path: Path) -> None:
    train = TrainSettings(
        learning_rate=3e-4, per_device_train_batch_size=3, gradient_accumulation_steps=5, weight_decay=0.1,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, optim="sgd", max_grad_norm=0.5,
        adam_beta2=0.95, neftune_noise_alpha=5, gradient_checkpointing=True, eval_steps=4, save_steps=8,
    )  # fmt: skip
    made = training_arguments(train, folder=tmp_path, seed=7, steps=100, evaluates=True)
    for name in SAME_NAME:
        value = getattr(train, name)
        found = getattr(made, name)
        assert getattr(found, "value", found) == value, name
    assert (made.max_steps, made.seed, made.data_seed, made.output_dir) == (100, 7, 7, str(tmp_path))
    assert made.eval_strategy.value == "steps" and made.eval_steps == 4
    assert made.report_to == [] and not made.logging_nan_inf_filter
    assert made.warmup_steps == 3


@pytest.mark.parametrize(
    ("ratio", "steps", "total", "expected"), [(0.03, 0, 100, 3), (0.03, 7, 100, 7), (0.03, 0, 10, 1), (0.0, 0, 100, 0)]
)
def test_warmup(ratio: float, steps: int, total: int, expected: int, tmp_path: Path) -> None:
    train = TrainSettings(warmup_ratio=ratio, warmup_steps=steps)
    made = training_arguments(train, folder=tmp_path, seed=0, steps=total, evaluates=False)
    assert made.warmup_steps == expected
    assert made.eval_strategy.value == "no"


@pytest.mark.parametrize(
    ("epochs", "accumulation", "max_steps", "batches", "expected"),
    [(1, 1, -1, 10, 10), (3, 4, -1, 10, 9), (0.5, 1, -1, 10, 5), (1.5, 4, -1, 10, 5), (1, 1, 7, 10, 7), (1, 1, 7, None, 7)],
)  # fmt: skip
def test_steps(epochs: float, accumulation: int, max_steps: int, batches: int | None, expected: int) -> None:
    train = TrainSettings(num_train_epochs=epochs, gradient_accumulation_steps=accumulation, max_steps=max_steps)
    assert total_steps(train, batches) == expected
    if batches and max_steps < 0:
        assert expected == math.ceil(epochs * math.ceil(batches / accumulation))


def test_liger_is_asked_for_before_training(tmp_path: Path) -> None:
    train = TrainSettings(use_liger_kernel=True)
    with pytest.raises(MissingError, match=r"GPU|pip install liger-kernel"):
        training_arguments(train, folder=tmp_path, seed=0, steps=1, evaluates=False)


def test_a_compiler_is_asked_for_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MissingError, match=r"train\.torch_compile: .* C\+\+ compiler"):
        training_arguments(TrainSettings(torch_compile=True), folder=tmp_path, seed=0, steps=1, evaluates=False)
