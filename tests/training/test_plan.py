"""`llmkit plan`: what it says of a recipe, the fastest way that fits, and the same check before a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import WontFitError
from llmkit.modeling import history
from llmkit.modeling.devices import GIB, Device
from llmkit.modeling.memory import Sharding
from llmkit.recipe import Recipe, parse
from llmkit.stages import lora, sft
from llmkit.training.plan import (
    Plan,
    as_data,
    divisors,
    from_config,
    keys,
    make_plan,
    preset,
    process_base,
    sharding_of,
    versions,
)
from llmkit.training.plan_report import as_text, check, wont_fit
from llmkit.training.settings import TrainingRecipe

GPU = Device("test-gpu", 40 * GIB, 80 * GIB, peak=300e12, cost_per_hour=2.0, count=1, where="test")
CPU = Device("cpu", 16 * GIB, 16 * GIB, cpu=True, count=1, where="test")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    for name in ("WORLD_SIZE", "LLMKIT_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """Only the config.json of a Llama 3 8B."""
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "dtype": "bfloat16", "hidden_act": "silu", "max_position_embeddings": 8192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe(model: Path, kind: type[Recipe] = sft.Recipe, **blocks: Any) -> TrainingRecipe:
    rows = Path("rows.jsonl")
    if not rows.exists():
        rows.write_text(
            "".join(json.dumps({"prompt": f"What is {i}?", "completion": "A number."}) + "\n" for i in range(100))
        )
    data = {"train": str(rows), "max_length": 2048, "packing": True} | blocks.pop("data", {})
    made = parse(
        {"name": "t", "model": {"name_or_path": str(model)} | blocks.pop("model", {}), "data": data, **blocks}, kind
    )
    assert isinstance(made, TrainingRecipe)
    return made


def planned(given: TrainingRecipe, device: Device = GPU, processes: int = 1) -> Plan:
    return make_plan(given, "sft", device, processes)


def test_a_model_of_8_billion_on_40_gib(llama_8b: Path) -> None:
    """16 GB of weights and 32 GB of states do not fit on one card, nor on two without sharding; ZeRO 3 over eight does."""
    own = planned(recipe(llama_8b, train={"per_device_train_batch_size": 4}))
    a = own.own.setup.architecture
    assert a.parameters == 8_030_261_248
    assert a.source == "config.json"
    memory = own.own.memory
    assert memory.size("weights") == 2 * a.parameters
    assert memory.size("optimizer") == 4 * a.parameters
    assert not own.own.fits
    assert not own.fits
    eight = planned(recipe(llama_8b, train={"per_device_train_batch_size": 4}), processes=8)
    fitting = {o.name for o in eight.options if o.fits}
    assert "none" not in fitting
    assert eight.proposal is not None
    assert eight.proposal.batch * eight.proposal.accumulation == 4
    assert eight.proposal.fits


def test_options_side_by_side(llama_8b: Path) -> None:
    found = planned(recipe(llama_8b), processes=8)
    assert [o.name for o in found.options] == [
        "none", "zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload", "zero3_nvme", "fsdp", "fsdp_offload",
    ]  # fmt: skip
    by_name = {o.name: o.memory.device for o in found.options}
    assert by_name["zero1"] > by_name["zero2"] > by_name["zero3"]
    assert by_name["zero2"] > by_name["zero2_offload"]
    text = as_text(found)
    assert text.count("the recipe's own") == 1
    for word in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "communication",
        "disk",
        "propose",
        "speed",
    ):
        assert word in text


def test_an_adapter_fits_where_all_weights_do_not(llama_8b: Path) -> None:
    given = recipe(llama_8b, lora.Recipe, train={"per_device_train_batch_size": 1})
    found = make_plan(given, "lora", GPU, 1)
    assert found.own.fits
    assert (
        found.own.memory.size("gradients")
        == 4 * 16 * (2 * 4096 + 2 * (4096 + 1024) + 4096 * 2 + 3 * (4096 + 14336)) * 32
    )


def test_time_and_money_from_a_stated_share_of_the_peak(tiny_llama: Path) -> None:
    given = recipe(tiny_llama, train={"max_steps": 10, "per_device_train_batch_size": 2}, data={"packing": False})
    length = planned(given).length
    assert (length.steps, length.tokens) == (10, pytest.approx(20 * planned(given).load.mean))
    assert length.flops is not None
    assert length.seconds == pytest.approx(length.flops / (0.4 * 300e12))
    assert length.cost == pytest.approx(length.seconds * 2.0 / 3600)  # type: ignore[operator]
    assert "assumed: 40% of the peak" in length.source
    unknown = planned(given, CPU).length
    assert (unknown.seconds, unknown.cost) == (None, None)
    assert "no run of this kind" in unknown.source


def test_time_from_what_was_measured_here(tiny_llama: Path) -> None:
    record = history.Record(
        at="", name="r", device="test-gpu", cpu=False, processes=1, sharding="none", kind="full float32",
        parameters=make_plan(recipe(tiny_llama), "sft", GPU, 1).own.setup.architecture.parameters,
        predicted_host=1.0, measured_host=1.0, predicted_device=90.0, measured_device=100.0, base=5e8, flops=1e9,
        versions=versions(),
    )  # fmt: skip
    history.append(record)
    found = planned(recipe(tiny_llama))
    assert found.length.seconds == pytest.approx(found.length.flops / 1e9)  # type: ignore[operator]
    assert "measured: median of 1 past run" in found.length.source
    assert found.past is not None
    assert found.past.mean == pytest.approx(0.1)
    assert "10% off" in as_text(found)
    assert process_base() == (5e8, "median of 1 past run(s) with these libraries")


def test_a_stream_without_rows_is_planned_too(llama_8b: Path) -> None:
    given = recipe(llama_8b, data={"train": "s3://bucket/rows.jsonl", "streaming": True}, train={"max_steps": 5})
    found = planned(given)
    assert found.length.steps == 5
    assert found.own.setup.part_tokens == 8 * 2048
    unknown = planned(recipe(llama_8b, data={"train": "s3://bucket/rows.jsonl"}))
    assert unknown.length.steps is None
    assert "not known" in as_text(unknown)


def test_auto_takes_the_largest_batch_that_fits_and_keeps_the_step(llama_8b: Path) -> None:
    train = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 2}
    given = recipe(llama_8b, lora.Recipe, train=train)
    own = make_plan(given, "lora", GPU, 1).own
    assert own.batch * own.accumulation == 16
    assert own.fits
    twice = next(n for n in reversed(divisors(16)) if n > own.batch)
    fixed = recipe(
        llama_8b, lora.Recipe, train={"per_device_train_batch_size": twice, "gradient_accumulation_steps": 16 // twice}
    )
    assert not make_plan(fixed, "lora", GPU, 1).own.fits


def test_a_proposal_is_written_as_recipe_keys(llama_8b: Path) -> None:
    found = planned(recipe(llama_8b), processes=8)
    assert found.proposal is not None
    changes = keys(found)
    assert changes["train.per_device_train_batch_size"] == found.proposal.batch
    assert changes["deepspeed"] == found.proposal.name
    text = as_text(found)
    assert f"deepspeed: {found.proposal.name}" in text
    assert "  per_device_train_batch_size:" in text


def test_nothing_fits(llama_8b: Path) -> None:
    small = replace(GPU, memory=1 * GIB, host_memory=1 * GIB)
    found = planned(recipe(llama_8b), small)
    assert found.proposal is None
    assert "nothing fits" in as_text(found)
    assert keys(found) == {}


def test_json_is_plain(llama_8b: Path) -> None:
    data = json.loads(json.dumps(as_data(planned(recipe(llama_8b), processes=4))))
    assert {"terms", "options", "proposal", "run", "disk", "device", "data", "model", "past_predictions"} <= data.keys()
    assert sum(t["at_peak"] for t in data["terms"] if not t["host"]) == pytest.approx(
        next(o["device_bytes"] for o in data["options"] if o["own"])
    )


def test_presets_and_configurations(llama_8b: Path) -> None:
    a = planned(recipe(llama_8b)).own.setup.architecture
    two = preset("zero2_offload", a)
    assert (two.name, two.optimizer, two.parameters, two.reduce_bucket) == ("zero2_offload", "cpu", "none", 4096**2)
    assert preset("zero3_nvme", a).parameters == "nvme"
    own = {
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu"},
            "reduce_bucket_size": 7,
            "overlap_comm": True,
        }
    }
    found = from_config(own, a)
    assert (found.stage, found.optimizer, found.parameters, found.reduce_bucket, found.overlap) == (
        3,
        "none",
        "cpu",
        7,
        True,
    )
    assert from_config({}, a).stage == 0
    assert sharding_of(recipe(llama_8b), a) == Sharding()
    assert sharding_of(recipe(llama_8b, deepspeed="zero3_offload"), a).name == "zero3_offload"
    assert sharding_of(recipe(llama_8b, fsdp={"offload_params": True}), a).name == "fsdp_offload"


def test_the_check_before_a_run(llama_8b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    class Progress:
        note = staticmethod(notes.append)

    monkeypatch.setattr("llmkit.training.plan_report.device", lambda: CPU)
    told: Any = Progress()
    assert check(recipe(llama_8b), "sft", told) is not None
    assert notes[0].startswith("warning: This run will not fit: each process needs about")
    assert check(recipe(llama_8b, plan="off"), "sft", told) is None
    with pytest.raises(WontFitError, match="plan: warn in the recipe starts it anyway"):
        check(recipe(llama_8b, plan="error"), "sft", told)
    assert check(recipe(Path("nowhere")), "sft", told) is None  # loading says it better
    assert len(notes) == 1


def test_a_full_disk_is_seen(tiny_llama: Path) -> None:
    found = replace(planned(recipe(tiny_llama), CPU), disk_free=1000.0)
    assert not found.fits
    assert "free. Set train.save_total_limit=1" in wont_fit(found)
    assert "not enough" in as_text(found)


def test_divisors() -> None:
    assert divisors(12) == [12, 6, 4, 3, 2, 1]
