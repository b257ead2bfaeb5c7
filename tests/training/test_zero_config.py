"""DeepSpeed's configuration: presets, ``auto``, and every disagreement with the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import MissingError, RecipeError, UsageError
from llmkit.recipe import parse
from llmkit.stages.lora import Recipe as LoraRecipe
from llmkit.stages.sft import Recipe
from llmkit.training import zero_config
from llmkit.training.settings import TrainSettings
from llmkit.training.zero_config import Facts, mistakes, preset, read, resolve

REPO = Path(__file__).resolve().parents[2]
FACTS = Facts(
    processes=2, bf16=False, fp16=False, hidden_size=64, largest=5000, steps=12, warmup=3, swap=Path("/out/nvme_swap")
)
HF_EXAMPLE = {
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "reduce_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}  # fmt: skip


def sft(**keys: Any) -> Recipe:
    return parse({"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "d.jsonl"}} | keys, Recipe)


def problems(**keys: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        sft(**keys)
    return {problem.key: f"{problem.message} {problem.hint}" for problem in caught.value.problems}


def test_presets_are_those_of_the_recipes_folder() -> None:
    """One source: the files are written by the module."""
    files = {path.stem: json.loads(path.read_text()) for path in (REPO / "recipes" / "deepspeed").glob("*.json")}
    assert files == {name: preset(name) for name in zero_config.PRESETS}
    assert len(files) == 7


@pytest.mark.parametrize("name", zero_config.PRESETS)
def test_a_preset_leaves_nothing_auto(name: str) -> None:
    made = resolve(preset(name), TrainSettings(), FACTS)
    assert "auto" not in json.dumps(made)
    assert made["train_batch_size"] == 16
    assert made["gradient_clipping"] == 1.0
    assert zero_config.stage_of(made) == int(name[4])
    assert zero_config.offload(made, "optimizer") == {"offload": "cpu", "nvme": "nvme"}.get(name[6:], "none")


def test_the_customary_file_is_filled_in() -> None:
    train = TrainSettings(
        learning_rate=3e-5, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, max_grad_norm=0.5, lr_scheduler_type="linear", bf16=True,
    )  # fmt: skip
    made = resolve(HF_EXAMPLE, train, Facts(**{**vars(FACTS), "bf16": True}))
    assert made["optimizer"]["params"] == {"lr": 3e-5, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}
    assert made["scheduler"]["params"] == {
        "warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 3, "total_num_steps": 12,
    }  # fmt: skip
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert (made["gradient_accumulation_steps"], made["gradient_clipping"]) == (4, 0.5)
    assert made["bf16"]["enabled"] is True
    assert made["fp16"]["enabled"] is False
    assert made["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    assert HF_EXAMPLE["bf16"] == {"enabled": "auto"}, "the given one was changed"


def test_all_disagreements_come_in_one_error_with_both_sides() -> None:
    file = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}},
        "bf16": {"enabled": False}, "zero_optimization": {"stage": 2},
    }  # fmt: skip
    found = problems(deepspeed=file, train={"learning_rate": 1e-5, "bf16": True})
    assert set(found) == {
        "deepspeed.train_micro_batch_size_per_gpu", "deepspeed.gradient_accumulation_steps",
        "deepspeed.gradient_clipping", "deepspeed.optimizer.params.lr", "deepspeed.optimizer.params.betas",
        "deepspeed.optimizer.params.eps", "deepspeed.optimizer.params.weight_decay", "deepspeed.scheduler.type",
        "deepspeed.scheduler.params.warmup_max_lr", "deepspeed.bf16.enabled",
    }  # fmt: skip
    assert found["deepspeed.optimizer.params.lr"].startswith("is 0.0001, but `train.learning_rate` is 1e-05")
    assert "`train.bf16 (or model.dtype)` is true" in found["deepspeed.bf16.enabled"]


def test_what_only_the_start_knows_is_compared_at_the_start() -> None:
    file = {"train_batch_size": 32, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    assert sft(deepspeed=file).deepspeed == file
    with pytest.raises(UsageError) as caught:
        resolve(file, TrainSettings(), FACTS, source="ds.json")
    lines = str(caught.value).splitlines()
    assert lines[0] == "ds.json does not go with the recipe:"
    assert any(
        line.startswith("  train_batch_size: is 32, but `train.per_device") and "is 16" in line for line in lines
    )
    assert any(line.startswith("  fp16.enabled: is true, but") for line in lines)
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("zero", "key", "says"),
    [
        ({"stage": 5}, "stage", "expected 1, 2 or 3, got 5"),
        ({"stage": 0}, "stage", "remove `deepspeed`"),
        ({}, "stage", "got None"),
        ({"stage": 2, "stage3_max_live_parameters": 1}, "stage3_max_live_parameters", "needs stage 3"),
        ({"stage": 1, "sub_group_size": 1}, "sub_group_size", "needs stage 3"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param", "needs stage 3, and the stage is 2"),
        ({"stage": 2, "cpu_offload": True}, "cpu_offload", "offload_optimizer: {device: cpu}"),
        ({"stage": 3, "offload_optimizer": {"device": "disk"}}, "offload_optimizer.device", "none, cpu or nvme"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.nvme_path", "is missing"),
        ({"stage": 2, "overlap_com": True}, "overlap_com", "did you mean `overlap_comm`?"),
    ],
)
def test_a_wrong_zero_block(zero: dict[str, Any], key: str, says: str) -> None:
    assert says in problems(deepspeed={"zero_optimization": zero})[f"deepspeed.zero_optimization.{key}"]


@pytest.mark.parametrize(
    ("config", "key", "says"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation", "did you mean `zero_optimization`?"),
        ({"amp": {"enabled": True}}, "amp", "`train.bf16`"),
        ({"zero_optimization": 2}, "zero_optimization", "expected a mapping"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled", "excludes `bf16.enabled`"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "none that a recipe can name"),
        ({"optimizer": {"type": "SGD"}}, "optimizer.type", "is SGD, but `train.optim` is adamw_torch_fused"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type", "is OneCycle, but"),
    ],
)
def test_a_wrong_block(config: dict[str, Any], key: str, says: str) -> None:
    found = {
        m.key: f"{m.message} {m.hint}" for m in mistakes({"zero_optimization": {"stage": 2}} | config, TrainSettings())
    }
    assert says in found[key]


def test_a_name_that_is_no_preset_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "Did you mean zero3_offload?" in problems(deepspeed="zero3_ofload")["deepspeed"]
    assert sft(deepspeed="configs/mine.json").deepspeed == "configs/mine.json"
    with pytest.raises(MissingError, match=r"nothere\.json cannot be read"):
        read("/nothere.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        read(str(broken))
    broken.write_text("[]")
    with pytest.raises(UsageError, match="holds no JSON object"):
        read(str(broken))


def test_what_does_not_go_with_a_divided_model() -> None:
    assert "excludes `deepspeed`" in problems(deepspeed="zero2", fsdp={})["fsdp"]
    assert "adafactor" in problems(deepspeed="zero2", train={"optim": "adafactor"})["train.optim"]
    assert "divides" in problems(fsdp={}, train={"torch_compile": True})["train.torch_compile"]
    assert "loss scaler" in problems(fsdp={}, train={"fp16": True})["train.fp16"]
    sharded = {"name_or_path": "m", "init": "sharded"}
    assert "nothing divides the model" in problems(model=sharded)["model.init"]
    assert "needs ZeRO stage 3" in problems(model=sharded, deepspeed="zero2")["model.init"]
    assert sft(model=sharded, deepspeed="zero3_offload").model.init == "sharded"
    assert sft(model=sharded, deepspeed="some/file.json").model.init == "sharded"


def test_adapters_that_need_whole_weights() -> None:
    base = {"name": "x", "data": {"train": "d.jsonl"}, "deepspeed": "zero3"}
    with pytest.raises(RecipeError, match="no process has them"):
        parse(base | {"model": {"name_or_path": "m", "init": "sharded"}, "adapter": {"use_dora": True}}, LoraRecipe)
    with pytest.raises(RecipeError, match="cannot be gathered apart"):
        parse(base | {"model": {"name_or_path": "m"}, "adapter": {"modules_to_save": ["lm_head"]}}, LoraRecipe)


def test_fsdp_settings_that_nothing_would_read() -> None:
    assert "is read with" in problems(fsdp={"min_num_params": 10})["fsdp.min_num_params"]
    wrong = problems(fsdp={"auto_wrap_policy": "NO_WRAP", "transformer_layer_cls_to_wrap": ["Block"]})
    assert "is read with" in wrong["fsdp.transformer_layer_cls_to_wrap"]
    assert "expected 2" in problems(fsdp={"fsdp_version": 1})["fsdp.fsdp_version"]


def test_the_length_of_the_run_is_filled_in_when_it_is_known() -> None:
    train = TrainSettings(lr_scheduler_type="linear")
    made = resolve(HF_EXAMPLE, train, Facts(**{**vars(FACTS), "steps": None, "warmup": None}))
    done = zero_config.with_schedule(made, steps=40, warmup=4)
    assert done["scheduler"]["params"]["total_num_steps"] == 40
    assert "auto" not in json.dumps(done)
    with pytest.raises(UsageError, match=r"is 40, but `train\.max_steps` is 50"):
        zero_config.with_schedule(done, steps=50, warmup=4)


def test_the_engine_gets_neither_optimizer_nor_schedule() -> None:
    """They are the trainer's own: the same step as without DeepSpeed."""
    made = zero_config.for_engine(resolve(HF_EXAMPLE, TrainSettings(lr_scheduler_type="linear"), FACTS))
    assert not {"optimizer", "scheduler"} & set(made)
    assert made["zero_allow_untested_optimizer"] is True
