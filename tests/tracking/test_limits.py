"""Names, values and batches within MLflow's limits; flattening; links. Field lesson 28."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.utils import validation

from llmkit.recipe import Recipe, TrackingSettings
from llmkit.tracking import flatten, limits, run_url, ui_command
from llmkit.tracking.batches import Batch, collect, dataset_fields
from llmkit.tracking.delivery import _parts
from llmkit.tracking.links import absolute_uri, artifact_location
from llmkit.tracking.spool import Event


def test_the_limits_are_those_of_the_installed_mlflow() -> None:
    assert validation.MAX_PARAM_VAL_LENGTH == limits.PARAM
    assert validation.MAX_TAG_VAL_LENGTH == limits.TAG
    assert validation.MAX_ENTITY_KEY_LENGTH == limits.KEY
    assert validation.MAX_METRICS_PER_BATCH == limits.METRICS_PER_CALL
    assert validation.MAX_PARAMS_TAGS_PER_BATCH == limits.PAIRS_PER_CALL
    assert validation.MAX_DATASET_DIGEST_SIZE == limits.DATASET_DIGEST


@pytest.mark.parametrize("key", ["k" * 300, "a*b", "a(b)", "../up", "/root", "a//b", "한국어*", "*", ""])
def test_any_key_becomes_one_that_mlflow_takes(key: str) -> None:
    clean = limits.clean_key(key)
    validation._validate_param(clean, "v")
    validation._validate_metric_name(clean)
    assert clean != key


def test_good_keys_stay_and_different_keys_stay_different() -> None:
    assert limits.clean_key("train.learning_rate") == "train.learning_rate"
    assert len({limits.clean_key(k) for k in ("a*b", "a(b", "a_b", "k" * 300, "k" * 301)}) == 5


def test_shortened_values_say_so() -> None:
    assert limits.shorten("x" * 6000, 6000) == "x" * 6000
    short = limits.shorten("x" * 6001, 6000)
    assert len(short) == 6000 and short.endswith("[6001 characters, whole in params_full.json]")


def event(kind: str, start: int = 0, **body: object) -> Event:
    return Event(kind, 1, body, start, start + 1)


def test_events_are_collected_up_to_a_call() -> None:
    many = [event("metrics", i, step=i, metrics={"a": 1.0, "b": 2.0}) for i in range(2000)]
    assert len(collect(many)) == 500
    assert len(collect([*many[:3], event("artifact", 5)])) == 3
    assert [e.kind for e in collect([event("artifact"), *many])] == ["artifact"]
    assert collect([]) == []


def test_parts_keep_to_count_and_bytes() -> None:
    assert [len(p) for p in _parts(list(range(250)), 100, lambda _: 1)] == [100, 100, 50]
    assert [len(p) for p in _parts(list(range(4)), 100, lambda _: 400_000)] == [2, 2]
    assert list(_parts([], 1, lambda _: 1)) == []


def test_changed_params_become_tags() -> None:
    batch = Batch.of([event("params", params={"a": "1", "b": "2", "c": "3", "long": "x" * 7000})])
    assert batch.cut
    new, changed = batch.new_params({"a": "1", "b": "9", "long": limits.shorten(limits.shorten("x" * 7000, 6000), 250)})
    assert new == {"c": "3"} and changed == {"llmkit.changed.b": "2"}


def test_long_digests_stay_whole_in_the_profile() -> None:
    body = {"name": "d", "digest": "sha256:" + "a" * 64, "source": "hf://x", "context": "eval", "profile": {"rows": 1}}
    fields, context = dataset_fields(body)
    assert len(fields["digest"]) == 36 and "sha256:aaa" in fields["profile"] and context == "eval"
    assert fields["source_type"] == "hf"


def test_flatten_a_recipe() -> None:
    recipe = Recipe(name="n", output_dir="o", tracking=TrackingSettings(tags={"team": "nlp"}))
    flat = flatten(recipe)
    assert flat["name"] == "n" and flat["tracking.enabled"] == "true" and flat["tracking.uri"] == "null"
    assert flat["tracking.tags.team"] == "nlp"
    assert flatten({"s3": {"secret_key": "x"}, "uri": "https://u:p@h"}) == {
        "s3.secret_key": "***",
        "uri": "https://***@h",
    }


def test_flatten_lists_and_empty_blocks() -> None:
    tree = {
        "data": {"train": [{"path": "a", "weight": 2.0}, "b"]},
        "betas": [0.9, 0.95],
        "empty": {},
        "lr": 2e-5,
        "text": "true",
    }
    assert flatten(tree) == {
        "data.train.0.path": "a",
        "data.train.0.weight": "2.0",
        "data.train.1": "b",
        "betas": "[0.9, 0.95]",
        "empty": "{}",
        "lr": "2e-05",
        "text": "true",
    }


def test_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("mlruns") == (tmp_path / "mlruns").as_uri()
    assert ui_command() == "mlflow server --backend-store-uri sqlite:///mlflow.db --port 5000"
    assert "sqlite:////elsewhere/m.db" in ui_command("sqlite:////elsewhere/m.db")
    assert artifact_location("sqlite:////a/mlflow.db", "my exp/1") == "file:///a/mlruns/my_exp_1"
    assert artifact_location("http://x", "e") is None
    assert run_url("https://u:p@h/", "1", "r") == "https://h/#/experiments/1/runs/r"
