"""What must hold whatever the recipe: the step [11], [12], every way to train, failures [14]."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import (
    SUMS,
    assert_close,
    assert_identical,
    history,
    logged,
    overfitting,
    recipe,
    run,
    weights,
)

import llmkit
from llmkit import api
from llmkit.errors import GateError, UsageError

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
