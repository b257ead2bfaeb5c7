"""``llmkit label`` as a whole, with tiny models: what comes out, what is refused, what a kill or a cap leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import llmkit
from llmkit.errors import DataError, GateError, RecipeError
from llmkit.recipe import parse
from llmkit.stages.label import Recipe

PLAIN = "---\nname: intent\nvariables: [{name: text}]\n---\n{% user %}{{ text }}{% enduser %}\n"
JSON = """---
name: attributes
variables: [{name: text}]
output_schema: {type: object}
---
{% user %}{{ text }}{% enduser %}
"""
LABELS = {"card_lost": "lost card", "card_late": "late card", "other": {"text": "other", "description": "all else"}}


@pytest.fixture
def base(tmp_path: Path, tiny_llama: Path) -> dict[str, Any]:
    texts = ["Where is my card?", "I lost it", "한국어 문장", "I lost it", "", "How many legs has a spider?"]
    golds = ["card_late", "card_lost", "other", "card_lost", "other", "surprise"]
    rows = [{"text": t, "category": g, "n": n} for n, (t, g) in enumerate(zip(texts, golds, strict=True))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    (tmp_path / "intent.jinja").write_text(PLAIN)
    return {
        "name": "l", "models": {"name_or_path": str(tiny_llama), "device": "cpu", "name": "tiny"},
        "templates": str(tmp_path / "intent.jinja"), "input": {"path": str(tmp_path / "rows.jsonl")},
        "labels": LABELS, "gold": {"column": "category"}, "tracking": {"enabled": False},
        "output_dir": str(tmp_path / "run"), "output": {"rows_per_shard": 10},
    }  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_labels_by_score_with_probabilities_gold_and_provenance(base: dict[str, Any], tmp_path: Path) -> None:
    result = llmkit.label(base)
    made = rows_of(tmp_path / "run/labels")
    assert [row["n"] for row in made] == [0, 1, 2, 3, 5]  # the empty text is a bad row
    assert len((tmp_path / "run/errors.jsonl").read_text().splitlines()) == 1
    for row in made:
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert row["confidence"] == pytest.approx(max(row["probabilities"]), abs=1e-6)
        label = LABELS[row["label"]]
        assert row["completion"] == [
            {"role": "assistant", "content": label if isinstance(label, str) else label["text"]}
        ]
        assert row["prompt"][-1] == {"role": "user", "content": row["text"]}
        assert json.loads(row["labelled_by"])["models"] == ["tiny"]
    assert made[1]["probabilities"] == made[3]["probabilities"]
    assert result.metrics["labelled"] == 5
    assert result.metrics["gold_rows"] == 5
    assert 0 <= result.metrics["gold_accuracy"] <= 0.8  # a gold label that is none of the recipe's cannot be met
    assert {"report.md", "report.html", "confidence.png"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert "Against the gold labels" in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize("calibration", ["contextual", "batch"])
def test_calibration_is_kept_in_the_run(base: dict[str, Any], tmp_path: Path, calibration: str) -> None:
    scoring = {"calibration": calibration, "normalize": "mean", "content_free": ["N/A", "[MASK]"]}
    llmkit.label({**base, "scoring": scoring})
    assert set(json.loads((tmp_path / "run/calibration.json").read_text())) == {"tiny"}
    before = llmkit.label({**base, "output_dir": str(tmp_path / "plain")})
    assert before.metrics["confidence"] != llmkit.label({**base, "scoring": scoring}).metrics["confidence"]


def test_several_voters_and_a_label_model(base: dict[str, Any], tmp_path: Path, tiny_qwen: Path) -> None:
    models = [base["models"], {"name_or_path": str(tiny_qwen), "device": "cpu", "name": "other"}]
    (tmp_path / "second.jinja").write_text(
        PLAIN.replace("name: intent", "name: second").replace("{{ text }}", "Q: {{ text }}")
    )
    templates = [base["templates"], str(tmp_path / "second.jinja")]
    settings = {**base, "models": models, "templates": templates, "combine": {"rule": "dawid-skene"}}
    result = llmkit.label(settings)
    assert result.metrics["labelled"] + result.metrics["abstained"] == 5
    report = (tmp_path / "run/report.md").read_text()
    assert "label model" in report
    assert "Krippendorff" in report
    shares = {len(row["probabilities"]) for row in rows_of(tmp_path / "run/labels")}
    assert shares == {3}


def test_samples_vote_and_low_agreement_abstains(base: dict[str, Any], tmp_path: Path) -> None:
    drawn = {"method": "generate", "samples": 8, "generation": {"temperature": 1.5}}
    llmkit.label({**base, **drawn, "abstain": {"agreement": 0.99}})
    left = rows_of(tmp_path / "run/abstained")
    assert left
    assert {row["reason"] for row in left} <= {"agreement below the threshold", "tie"}
    assert all(row["agreement"] < 0.99 for row in left)
    assert "completion" not in left[0]
    assert all(row["agreement"] >= 0.99 for row in rows_of(tmp_path / "run/labels"))


def test_json_that_is_none_abstains(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "intent.jinja").write_text(JSON)
    settings = {key: value for key, value in base.items() if key not in ("labels", "gold")}
    result = llmkit.label({**settings, "generation": {"max_new_tokens": 8}})
    assert result.metrics["abstained"] == 5
    assert {row["reason"] for row in rows_of(tmp_path / "run/abstained")} == {"no usable answer"}


def test_the_cost_cap_keeps_what_is_done_and_a_higher_one_goes_on(base: dict[str, Any], tmp_path: Path) -> None:
    small = {"output": {"rows_per_shard": 2}}
    with pytest.raises(GateError, match="cost cap"):
        llmkit.label({**base, **small, "budget": {"tokens": 60}})
    done = sorted((tmp_path / "run/shards").glob("*.parquet"))
    assert 0 < len(done) < 3
    before = done[0].stat().st_mtime_ns
    llmkit.label({**base, **small, "budget": {"tokens": 100_000}})
    assert done[0].stat().st_mtime_ns == before
    llmkit.label({**base, **small, "output_dir": str(tmp_path / "whole")})
    assert rows_of(tmp_path / "run/labels") == rows_of(tmp_path / "whole/labels")


def test_a_gold_file_is_joined_by_key(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "gold.csv").write_text("n,right\n0,card_late\n1,card_lost\n")
    result = llmkit.label({**base, "gold": {"path": str(tmp_path / "gold.csv"), "key": "n", "column": "right"}})
    assert result.metrics["gold_rows"] == 2
    with pytest.raises(DataError, match=r"gold.column"):
        llmkit.label({**base, "gold": {"column": "nothing"}, "output_dir": str(tmp_path / "x")})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"labels": ["one"]}, "labels"),
        ({"labels": ["a", "a"]}, "labels.1"),
        ({"samples": 3}, "samples"),
        ({"method": "generate", "samples": 3}, "generation.temperature"),
        ({"combine": {"rule": "dawid-skene"}}, "combine.rule"),
        ({"labels": None, "method": "generate"}, "method"),
        ({"models": {"base_url": "http://localhost:1/v1", "model": "m"}}, "method"),
        ({"gold": {"column": "c", "path": "x.csv"}}, "gold.key"),
        ({"classes": ["a", "b"]}, "classes"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_together(base: dict[str, Any], change: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse({**base, **change}, Recipe)
    assert any(problem.key == key for problem in error.value.problems), error.value
