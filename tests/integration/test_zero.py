"""Divided models: the curve, the export, the checkpoint and the resumed run of every ZeRO stage and of FSDP2."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import SUMS, assert_close, assert_identical, history, overfitting, recipe, run, weights

from llmkit.errors import GateError, UsageError

TORCH_ADAM = {"zero_force_ds_cpu_optimizer": False}
"""Offloaded states are updated by torch's optimizer, which needs no compiler."""
SETTINGS = ("zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp")
LOSS_TOLERANCE = 1e-4
"""Relative, of the loss of every step, in float32; docs/deepspeed.md states it."""


def setting(name: str) -> dict[str, Any]:
    """As a recipe says it."""
    from llmkit.training.zero_config import preset

    if name == "fsdp":
        return {"fsdp": {}}
    return {"deepspeed": preset(name) | TORCH_ADAM if "offload" in name else name}


def sums(folder: Path, model: Path, kind: str, **train: Any) -> dict[str, Any]:
    """Six steps of two batches of two rows, which go through the model in parts."""
    made = recipe(
        folder, model,
        **{
            "max_steps": 6, "save_steps": 3, "num_train_epochs": 1, "learning_rate": 2e-3, "micro_batch_tokens": 60,
            "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
        } | train,
    )  # fmt: skip
    return made | ({"adapter": {"r": 4}} if kind == "lora" else {})


@pytest.fixture(scope="module")
def unchecked() -> Iterator[None]:
    """Exports are not opened again in a process of their own, except where a test is about that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmkit.training.outcome.verify", lambda *_: None)
        patch.setattr("llmkit.training.weights.verify", lambda *_: SimpleNamespace(relative=0.0))
        yield


@pytest.fixture(scope="module")
def plain(
    tiny_llama: Path, tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory, unchecked: None
) -> dict[str, tuple[dict[str, Any], dict[int, float], dict[str, torch.Tensor]]]:
    """Recipe, losses and weights of one process without sharding, of all weights and of an adapter."""
    found = {}
    for kind, model in (("full", tiny_llama), ("lora", tiny_qwen)):
        folder = tmp_path_factory.mktemp(kind)
        base = sums(folder, model, kind)
        run(base, "plain", "sft" if kind == "full" else "lora")
        found[kind] = (base, history(folder / "plain"), weights(folder / "plain"))
    return found


def resumed(out: Path, base: dict[str, Any], stage: str) -> None:
    """Forget the end of a run and go on from its middle."""
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    (out / "result.json").unlink()
    run(base, out.name, stage)


# One process


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_process_learns_what_it_learns_undivided(kind: str, plain: Any) -> None:
    """[11], [16], [18]: the curve, the export, the checkpoint's weights, the resumed run."""
    from llmkit.training.weights import export_weights

    base, losses, trained = plain[kind]
    stage = "sft" if kind == "full" else "lora"
    for name in SETTINGS:
        out = Path(base["output_dir"]).with_name(name)
        run(base | setting(name), name, stage)
        assert history(out) == pytest.approx(losses, rel=LOSS_TOLERANCE), name
        assert_close(weights(out), trained, 2e-4)
        if "offload" in name:
            continue
        assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}
        made = export_weights(
            out / "checkpoints" / "checkpoint-6", out / "exported", dtype="bfloat16" if kind == "full" else None
        )
        (file,) = Path(made.output).glob("*.safetensors")
        assert_close({k: v.float() for k, v in load_file(file).items()}, weights(out), 5e-3)
        first = weights(out)
        resumed(out, base | setting(name), stage)
        assert history(out) == pytest.approx(losses, rel=LOSS_TOLERANCE), name
        assert_identical(weights(out), first)


def test_what_was_run_is_written_down(plain: Any) -> None:
    base, _, _ = plain["full"]
    config = json.loads((Path(base["output_dir"]).with_name("zero2") / "deepspeed.json").read_text())
    assert config["zero_optimization"]["stage"] == 2
    assert (config["train_batch_size"], config["gradient_accumulation_steps"], config["gradient_clipping"]) == (
        4,
        2,
        1.0,
    )
    assert "auto" not in json.dumps(config)
    about = Path(base["output_dir"]).with_name("zero2") / "checkpoints" / "checkpoint-6" / "export"
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {p.name for p in about.iterdir()}


@pytest.mark.usefixtures("unchecked")
def test_mixed_precision_exports_the_optimizers_own_weights(tiny_qwen: Path, tmp_path: Path) -> None:
    """bfloat16 is too coarse for these steps: only float32 weights can have moved so little."""
    base = sums(tmp_path, tiny_qwen, "full", bf16=True, learning_rate=1e-5)
    start = load_file(tiny_qwen / "model.safetensors")
    for name in ("zero2", "zero3", "fsdp"):
        run(base | setting(name), name)
        found = weights(tmp_path / name)
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        name_of_one = "model.layers.0.mlp.up_proj.weight"
        rounded = start[name_of_one].bfloat16().float()
        moved = (found[name_of_one] - (start[name_of_one] if name == "fsdp" else rounded)).abs()
        assert 0 < float(moved.max()) < 1e-4, name


@pytest.mark.usefixtures("unchecked")
def test_answers_held_out_loss_and_the_best_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    base = overfitting(tmp_path, tiny_llama, max_steps=8, load_best_model_at_end=True, sample_prompts=1)
    expected = run(base, "plain")
    for name in ("zero2", "zero3", "fsdp"):
        result = run(base | setting(name), name)
        assert result.metrics["eval_loss_before"] == pytest.approx(expected.metrics["eval_loss_before"], rel=1e-5)
        assert result.metrics["eval_loss_after"] == pytest.approx(expected.metrics["eval_loss_after"], rel=1e-3), name
        assert result.samples == expected.samples, name
        assert_close(weights(tmp_path / name), weights(tmp_path / "plain"), 1e-3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp"])
def test_a_loss_that_is_not_finite_ends_the_run(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """[14]"""
    base = sums(tmp_path, tiny_llama, "full", learning_rate=1e30, max_grad_norm=0, warmup_ratio=0)
    with pytest.raises(GateError, match="not finite"):
        run(base | setting(name), name)
    assert not (tmp_path / name / "model").exists()


def test_a_checkpoint_of_another_division_is_refused(plain: Any) -> None:
    """[17]"""
    base, _, _ = plain["full"]
    checkpoint = Path(base["output_dir"]).with_name("zero2") / "checkpoints" / "checkpoint-3"
    from llmkit import api

    with pytest.raises(UsageError, match="was written by ZeRO stage 2, and this run trains by ZeRO stage 3"):
        api.run("sft", base | setting("zero3"), output_dir=checkpoint.parents[2] / "other", resume=str(checkpoint))


def test_export_weights_says_what_it_cannot_read(plain: Any, tmp_path: Path) -> None:
    from llmkit.training.weights import export_weights

    base, _, _ = plain["full"]
    divided, whole = (Path(base["output_dir"]).with_name(name) for name in ("zero2", "plain"))
    with pytest.raises(UsageError, match="is a run, not a checkpoint"):
        export_weights(divided)
    with pytest.raises(UsageError, match="is whole already"):
        export_weights(whole / "checkpoints" / "checkpoint-3")
    with pytest.raises(UsageError, match="There is no checkpoint folder"):
        export_weights(tmp_path / "nothing")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(UsageError, match="is there already"):
        export_weights(divided / "checkpoints" / "checkpoint-3", tmp_path / "there")


# Two processes


def test_two_processes_learn_what_one_learns(plain: Any, tmp_path: Path) -> None:
    """[11], [16]: one start for all settings; held-out rows that do not divide evenly, answers of all ranks together."""
    runs: dict[str, Any] = {}
    for kind, (base, _, _) in plain.items():
        for name in ("zero1", "zero2", "zero3", "fsdp"):
            job = json.loads(json.dumps(base | setting(name)))
            job["train"]["per_device_train_batch_size"] = 1
            job["output_dir"] = str(tmp_path / f"{kind}-{name}")
            stage = "sft" if kind == "full" else "lora"
            runs[f"{kind}-{name}"] = {"stage": stage, "recipe": job, "resumes": name in ("zero2", "zero3", "fsdp")}
    sharded = json.loads(json.dumps(runs["full-zero3"]))
    sharded["recipe"] |= {"output_dir": str(tmp_path / "full-sharded")}
    sharded["recipe"]["model"]["init"] = "sharded"
    sharded["recipe"]["train"]["sample_prompts"] = 1
    sharded["recipe"]["data"]["eval"] = {"split": 0.15}
    runs["full-sharded"] = sharded | {"resumes": False}
    start(tmp_path, runs)
    for name in runs:
        out = tmp_path / name
        seen = json.loads((out / "seen.json").read_text())
        _, losses, trained = plain[name.split("-")[0]]
        found = {int(step): loss for step, loss in seen["losses"].items()}
        if name == "full-sharded":
            check_loading(seen["loading"])
            continue  # three rows are held out of its training
        assert found == pytest.approx(losses, rel=LOSS_TOLERANCE), name
        assert_close(torch.load(out / "weights.pt"), trained, 2e-4)
        if "resumed" in seen:
            assert seen["resumed"] == seen["losses"], name
            assert_identical(torch.load(out / "resumed.pt"), torch.load(out / "weights.pt"))


def check_loading(seen: dict[str, int]) -> None:
    """``model.init: sharded``: half of the weights here, none whole, and one weight at a time on the way."""
    assert seen["all"] > 50_000
    assert seen["whole"] == 0
    assert seen["all"] / 2 <= seen["here"] < 0.52 * seen["all"]
    assert seen["most_at_once"] < 0.4 * seen["all"]


def start(folder: Path, runs: dict[str, Any], processes: int = 2) -> None:
    job = folder / "job.json"
    job.write_text(json.dumps({"runs": runs}))
    worker = Path(__file__).resolve().parents[1] / "toys" / "zero_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(worker), str(job)], cwd=folder, capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert not done.returncode, done.stderr[-4000:]


def test_through_the_command_line(run_llmkit: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """launch.processes, ZeRO-3 from a file, the exported model and a converted checkpoint opened in fresh processes."""
    import yaml

    from llmkit.training.zero_config import preset

    (tmp_path / "zero3.json").write_text(json.dumps(preset("zero3")))
    base = sums(tmp_path, tiny_llama, "full", max_steps=2, save_steps=1, per_device_train_batch_size=1)
    base |= {"deepspeed": "zero3.json", "launch": {"processes": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base))
    done = run_llmkit("sft", "recipe.yaml", "--json")
    assert done.code == 0, done.stderr
    assert math.isfinite(done.json()["metrics"]["train_loss"])
    made = run_llmkit("export-weights", tmp_path / "out" / "checkpoints" / "checkpoint-2", "--json")
    assert made.code == 0, made.stderr
    assert made.json()["kind"] == "model"
    assert made.json()["relative"] < 1e-3
    (file,) = (tmp_path / "out" / "model-2").glob("*.safetensors")
    assert_close(load_file(file), weights(tmp_path / "out"), 1e-6)
    assert len(SUMS) == 21
