"""What must hold whatever the recipe: the step [11], [12], failures [14], resuming [16], [17], stopping [19]."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkit
from llmkit import api, runner
from llmkit.context import Result
from llmkit.errors import GateError, StoppedEarly, UsageError

Tensors = dict[str, torch.Tensor]
SUMS = [
    {"prompt": f"What is {a} + {b}?", "completion": f"{a + b}" if b % 2 else f"{a} + {b} is {a + b}. " * (1 + b)}
    for a in range(7)
    for b in range(3)
]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exported model is not opened again in a process of its own: other tests do that."""
    monkeypatch.setattr("llmkit.training.outcome.verify", lambda *_: None)
    monkeypatch.chdir(tmp_path)


def recipe(folder: Path, model: Path, *, data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    """21 rows of very unequal lengths, batches of 4, 12 steps in 2 epochs unless told otherwise."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return {
        "name": "sums", "output_dir": str(folder / "out"), "seed": 3,
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 128, "cache_dir": str(folder / "cache")} | (data or {}),
        "train": {
            "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
            "sample_prompts": 0, "save_total_limit": None,
        } | train,
        "tracking": {"enabled": False},
    }  # fmt: skip


def history(out: Path, key: str = "loss") -> dict[int, float]:
    """What the newest checkpoint says was logged."""
    newest = max((out / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    state = json.loads((newest / "trainer_state.json").read_text())
    return {entry["step"]: entry[key] for entry in state["log_history"] if key in entry}


def logged(out: Path, key: str) -> dict[int, float]:
    """What log.jsonl says, of all starts of the run together."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        values = line.get("metrics") or {}
        if key in values and line.get("step"):
            found[line["step"]] = values[key]
    return found


def weights(out: Path) -> Tensors:
    folder = out / "adapter" if (out / "adapter").exists() else out / "model"
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def assert_identical(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    assert len(a) > 3
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def assert_close(a: Tensors, b: Tensors, tolerance: float) -> None:
    assert a.keys() == b.keys()
    far = {n: float((a[n] - b[n]).abs().max()) for n in a if not torch.allclose(a[n], b[n], rtol=0, atol=tolerance)}
    assert not far


def run(what: dict[str, Any], name: str, stage: str = "sft", **overrides: Any) -> Result:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    out = str(Path(what["output_dir"]).with_name(name))
    return api.run(stage, what, keys, output_dir=out)


# The step


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_accumulation_changes_nothing(optim: str, tiny_llama: Path, tmp_path: Path) -> None:
    """[11]: 1 x 8 is 8 x 1, in parts or whole, though rows have 1 to 30 supervised tokens."""
    rate = {"sgd": 0.5, "adamw_torch": 1e-3}[optim]
    base = recipe(tmp_path, tiny_llama, optim=optim, learning_rate=rate, adam_epsilon=1e-4)
    whole = {"train__per_device_train_batch_size": 8, "train__micro_batch_tokens": 0}
    run(base, "whole", **whole)
    curve, final = history(tmp_path / "whole"), weights(tmp_path / "whole")
    assert len(curve) == 6
    for name, changed in {
        "accumulated": {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 8},
        "half": {"train__per_device_train_batch_size": 4, "train__gradient_accumulation_steps": 2},
        "parts": {"train__per_device_train_batch_size": 8, "train__micro_batch_tokens": 60},
        "tiny parts": {"train__per_device_train_batch_size": 8, "train__micro_batch_tokens": 1},
    }.items():
        run(base, name, **changed)
        assert history(tmp_path / name) == pytest.approx(curve, rel=1e-5), name
        assert_close(weights(tmp_path / name), final, 2e-5)


@pytest.mark.usefixtures("fast")
def test_packing_gives_the_loss_of_the_same_rows_unpacked(tiny_llama: Path, tmp_path: Path) -> None:
    """[12], through the whole stage: an epoch is one step, packed or not."""
    base = recipe(tmp_path, tiny_llama, num_train_epochs=4, per_device_train_batch_size=50, optim="sgd")
    run(base, "single")
    run(base, "packed", data__packing=True)
    assert len(history(tmp_path / "single")) == 4
    assert history(tmp_path / "packed") == pytest.approx(history(tmp_path / "single"), rel=1e-5)
    assert_close(weights(tmp_path / "packed"), weights(tmp_path / "single"), 1e-5)


@pytest.mark.usefixtures("fast")
def test_the_lean_way_learns_what_the_models_own_way_learns(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own attention, fused loss and lean layers beside transformers' own, padded, a loop of ten lines."""
    from transformers import AutoModelForCausalLM

    from llmkit.data.store import TokenStore

    monkeypatch.chdir(tmp_path)
    base = recipe(
        tmp_path, tiny_qwen, data={"shuffle": False}, max_steps=5, optim="sgd", learning_rate=0.1, warmup_ratio=0,
        lr_scheduler_type="constant", max_grad_norm=0, num_train_epochs=1,
    )  # fmt: skip
    run(base, "ours")
    (path,) = (tmp_path / "cache").rglob("train*.arrow")
    store = TokenStore(path)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32)
    losses = {}
    for step in range(5):
        rows = [store.row(i) for i in range(4 * step, min(4 * step + 4, len(store)))]
        count = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
        total = 0.0
        for ids, labels in rows:
            ids, labels = (torch.from_numpy(x.astype("int64"))[None] for x in (ids, labels))
            loss = model(ids, labels=labels).loss * int((labels[0, 1:] != -100).sum()) / count
            loss.backward()
            total += float(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
        losses[step + 1] = total
    assert history(tmp_path / "ours") == pytest.approx(losses, rel=1e-4)
    own = dict(model.named_parameters())
    assert_close(
        {k: v for k, v in weights(tmp_path / "ours").items() if k in own}, {k: own[k].detach() for k in own}, 1e-4
    )


# Every way to train runs to the end


def opened(out: Path, base: Path) -> Any:
    """The published model by from_pretrained alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    if (out / "adapter").exists():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    assert AutoTokenizer.from_pretrained(out / "model").chat_template or "t5" in base.name or "cpt" in out.name
    kind = AutoModelForSeq2SeqLM if "t5" in base.name else AutoModelForCausalLM
    return kind.from_pretrained(out / "model")


REAL = {
    "sft": ("sft", {}),
    "lora": ("lora", {"adapter.r": 4, "adapter.lora_dropout": 0.1}),
    "dora": ("lora", {"adapter.r": 4, "adapter.use_dora": True}),
    "bf16 weights": ("sft", {"model.dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", REAL)
def test_stages_publish_models_that_load(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage, changed = REAL[name]
    base = recipe(tmp_path, tiny_llama, data={"eval": {"split": 0.2}}, num_train_epochs=6, learning_rate=3e-3)
    result = api.run(stage, base, changed)
    assert (result.status, result.metrics["steps"]) == ("done", len(history(tmp_path / "out")))
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"]
    model = opened(tmp_path / "out", tiny_llama)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert result.metrics["tokens_per_second"] >= result.metrics["tokens_per_second_supervised"] > 0


def test_t5_learns_and_its_model_loads(tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = recipe(tmp_path, tiny_t5, data={"eval": {"split": 0.2}}, num_train_epochs=6, learning_rate=3e-3)
    result = llmkit.sft(base)
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"]
    # A decoder that saw the token that it is asked for would copy it: the loss would fall to nothing.
    assert result.metrics["eval_loss_after"] > 0.5
    opened(tmp_path / "out", tiny_t5)


@pytest.mark.usefixtures("fast")
def test_t5_takes_an_adapter_and_refuses_packing(tiny_t5: Path, tmp_path: Path) -> None:
    assert api.run("lora", recipe(tmp_path, tiny_t5, max_steps=2)).metrics["steps"] == 2
    with pytest.raises(UsageError, match=r"data\.packing: this model cannot keep packed rows apart"):
        run(recipe(tmp_path, tiny_t5), "packed", data__packing=True)


def corpus(folder: Path) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{row['completion']} and more. " * 4}) + "\n" for row in SUMS))
    return path


def test_cpt_from_scratch_with_a_tokenizer_of_its_own(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    base = recipe(tmp_path, tiny_llama, data={"train": str(corpus(tmp_path)), "format": "text", "packing": True})
    base["model"] |= {
        "init": "from_config",
        "tokenizer": {"vocab_size": 320},
        "config_overrides": {"num_hidden_layers": 1},
    }
    base["output_dir"] = str(tmp_path / "cpt")
    result = llmkit.cpt(base)
    assert result.status == "done"
    model = opened(tmp_path / "cpt", tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cpt" / "model")
    assert model.config.num_hidden_layers == 1
    assert len(tokenizer) <= 320 and model.get_input_embeddings().weight.shape[0] >= len(tokenizer)


OPTIONS: dict[str, dict[str, Any]] = {
    "gradient checkpointing": {"train.gradient_checkpointing": True},
    "neftune": {"train.neftune_noise_alpha": 5.0},
    "bf16 autocast": {"train.bf16": True},
    "sgd": {"train.optim": "sgd"},
    "adafactor": {"train.optim": "adafactor"},
    "fused adamw": {"train.optim": "adamw_torch_fused", "train.weight_decay": 0.1},
    "streaming": {"data.streaming": True, "train.max_steps": 7},
    "streaming, packed": {"data.streaming": True, "data.packing": True, "train.max_steps": 7},
    "eager attention": {"model.attn_implementation": "eager"},
    "sdpa attention": {"model.attn_implementation": "sdpa"},
    "schedule": {"train.lr_scheduler_type": "cosine_with_min_lr", "train.lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "stable": {"train.lr_scheduler_type": "warmup_stable_decay", "train.lr_scheduler_kwargs": {"num_decay_steps": 3}},
    "fp16 with loss scaling": {"train.fp16": True},
    "full determinism": {"train.full_determinism": True},
    "half an epoch": {"train.num_train_epochs": 0.5},
    "torch.compile": {"train.torch_compile": True, "train.max_steps": 2},
}


LORA_TOO = ("gradient checkpointing", "neftune", "bf16 autocast", "streaming")


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(("stage", "name"), [("sft", name) for name in OPTIONS] + [("lora", name) for name in LORA_TOO])
def test_options_train_to_the_end(stage: str, name: str, tiny_llama: Path, tmp_path: Path) -> None:
    if name == "torch.compile" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine")
    base = recipe(tmp_path, tiny_llama, num_train_epochs=3)
    result = api.run(stage, base, OPTIONS[name])
    curve = history(tmp_path / "out")
    planned = {"streaming": 7, "streaming, packed": 7, "half an epoch": 3, "torch.compile": 2}.get(name, 18)
    assert result.metrics["steps"] == len(curve) == planned
    assert all(value > 0 for value in curve.values())
    if planned > 10 and name != "sgd":
        assert curve[planned] < curve[1]
    assert opened(tmp_path / "out", tiny_llama)


@pytest.mark.usefixtures("fast")
def test_rows_that_a_stream_leaves_out_are_said_listed_and_tracked(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """[2], [1]: also where nothing is prepared up front."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps(SUMS[0]) + "\n")
    base = recipe(tmp_path, tiny_llama, max_steps=2, data={
        "streaming": True, "shuffle": False, "on_bad_row": "drop", "on_too_long": "drop", "eval": str(held_out),
    })  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    long = json.dumps({"prompt": "a", "completion": "b " * 300})
    rows.write_text('{"prompt": \n' + long + "\n" + rows.read_text())
    api.run("sft", base)
    assert "left out" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    train, eval_ = report["sources"]
    assert (train["key"], eval_["key"]) == ("data.train", "data.eval")
    assert train["bad"][0]["first"][0].endswith("rows.jsonl:1")
    assert train["too_long"][0]["row"].endswith("rows.jsonl:2")
    assert report["eval"]["rows"] == 1
    events = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [e["context"] for e in events if e["event"] == "dataset"] == ["train", "eval"]
    assert events[-1]["event"] == "status"


@pytest.mark.usefixtures("fast")
def test_checkpointed_activations_change_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    base = recipe(tmp_path, tiny_llama)
    run(base, "kept")
    run(base, "recomputed", train__gradient_checkpointing=True)
    assert_close(weights(tmp_path / "recomputed"), weights(tmp_path / "kept"), 1e-6)


@pytest.mark.usefixtures("fast")
def test_mixed_precision_follows_the_float32_curve(tiny_llama: Path, tmp_path: Path) -> None:
    base = recipe(tmp_path, tiny_llama, learning_rate=1e-3)
    run(base, "float32")
    run(base, "mixed", train__bf16=True)
    assert history(tmp_path / "mixed") == pytest.approx(history(tmp_path / "float32"), rel=0.01)
    assert {t.dtype for t in weights(tmp_path / "mixed").values()} == {torch.float32}


def overfitting(folder: Path, model: Path, **train: Any) -> dict[str, Any]:
    """Held-out rows that training makes worse after a while."""
    held_out = folder / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row | {"completion": "한국어 中文 Zwölf"}) + "\n" for row in SUMS[:4]))
    return recipe(
        folder, model, data={"eval": str(held_out)},
        **{"num_train_epochs": 20, "eval_steps": 2, "save_steps": 4, "learning_rate": 2e-2, "lr_scheduler_type": "constant"} | train,
    )  # fmt: skip


@pytest.mark.usefixtures("fast")
def test_early_stopping_publishes_the_best_weights(tiny_llama: Path, tmp_path: Path) -> None:
    result = api.run("sft", overfitting(tmp_path, tiny_llama, early_stopping_patience=2, save_total_limit=1))
    losses = logged(tmp_path / "out", "eval_loss")
    assert result.metrics["steps"] < 120, "it never stopped"
    best = min(losses, key=lambda step: losses[step])
    assert result.metrics["steps"] == best + 4, "two evaluations without a better one"
    assert result.metrics["eval_loss_after"] == pytest.approx(losses[best], rel=1e-6)
    kept = load_file(tmp_path / "out" / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    assert_identical(weights(tmp_path / "out"), kept)


@pytest.mark.usefixtures("fast")
def test_the_best_model_is_published_without_stopping(tiny_llama: Path, tmp_path: Path) -> None:
    result = api.run(
        "sft", overfitting(tmp_path, tiny_llama, load_best_model_at_end=True, max_steps=14, save_total_limit=1)
    )
    losses = history(tmp_path / "out", "eval_loss")
    assert result.metrics["steps"] == 14
    assert result.metrics["eval_loss_after"] == pytest.approx(min(losses.values()), rel=1e-6)
    names = {p.name for p in (tmp_path / "out" / "checkpoints").iterdir()}
    assert names == {"checkpoint-14", f"checkpoint-{min(losses, key=lambda s: losses[s])}"}


# What is not finite


def assert_nothing_published(out: Path, code: int = 4) -> None:
    assert not (out / "model").exists() and not (out / "adapter").exists()
    found = json.loads((out / "result.json").read_text())
    assert (found["status"], found["exit_code"]) == ("failed", code)


@pytest.mark.parametrize("extra", [{}, {"train.max_grad_norm": 0}, {"train.gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("stage", ["sft", "lora"])
@pytest.mark.usefixtures("fast")
def test_a_loss_that_is_not_finite_stops_the_run(
    stage: str, extra: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """[14]: the step and its rows are named, the last good checkpoint stays, nothing is published."""
    base = recipe(tmp_path, tiny_llama, learning_rate=1e30, warmup_ratio=0, save_steps=1, max_grad_norm=1)
    with pytest.raises(GateError, match=r"Step \d+: the loss .* or the gradient .* is not finite") as caught:
        api.run(stage, base, extra)
    text = str(caught.value)
    assert "rows.jsonl:" in text
    kept = list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    assert kept and str(kept[-1].parent) in text
    assert_nothing_published(tmp_path / "out")


@pytest.mark.usefixtures("fast")
def test_poisoned_weights_are_found_at_the_first_step(tiny_llama: Path, tmp_path: Path) -> None:
    poisoned = tmp_path / "poisoned"
    shutil.copytree(tiny_llama, poisoned)
    tensors = load_file(poisoned / "model.safetensors")
    tensors["lm_head.weight"][3] = 3e38
    save_file(tensors, poisoned / "model.safetensors", {"format": "pt"})
    with pytest.raises(GateError, match=r"Step 1: .* No checkpoint had been written yet") as caught:
        api.run("sft", recipe(tmp_path, poisoned))
    assert "rows.jsonl:" in str(caught.value)
    assert not list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    assert_nothing_published(tmp_path / "out")


def test_weights_that_the_last_step_ruined_are_not_published(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = recipe(tmp_path, tiny_llama, learning_rate=1e30, warmup_ratio=0, max_steps=1)
    with pytest.raises(GateError):
        api.run("sft", base)
    assert_nothing_published(tmp_path / "out")


@pytest.mark.usefixtures("fast")
def test_a_schedule_with_a_wrong_argument_is_a_mistake_in_the_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    base = recipe(tmp_path, tiny_llama, lr_scheduler_kwargs={"nonsense": 1})
    with pytest.raises(UsageError, match=r"train\.lr_scheduler_kwargs.*nonsense"):
        api.run("sft", base)


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
    assert f"Resuming from {kept}" in done.stderr
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
