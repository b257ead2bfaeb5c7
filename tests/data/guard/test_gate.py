"""What the guard decides, done in preparation and in streams: the same rows for every rank and every start."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmkit.data.guard import gate
from llmkit.data.guard.settings import GuardSettings
from llmkit.data.guard.view import rewrite, strings, view
from llmkit.data.prepare import Prepared, prepare, prepare_eval
from llmkit.data.render import Renderer
from llmkit.data.rows import Conversation, PromptCompletion, Text
from llmkit.data.settings import DataSettings
from llmkit.data.stream import TokenStream
from llmkit.errors import DataError, MissingError

OFF = dict.fromkeys(("privacy", "duplicates", "leaks", "contradictions", "quality"))
STREAM = OFF | {"privacy": {"action": "drop"}}
KEY = "a-secret-of-the-tests-0123456789"


@pytest.fixture
def settings(tmp_path: Path, words: Any) -> Callable[..., DataSettings]:
    """Settings over 60 rows: 4 and 21 are equal, 11 holds an address, 31 is held-out row 3; and over 12 held-out ones."""
    rows, test = words.rows(60), words.rows(12)
    rows[20] = rows[3]
    rows[10]["completion"] = "Mail kim@corp.co.kr or kim@corp.co.kr"
    test[5]["completion"] = "Mail lee@corp.co.kr"
    rows[30] = test[2]
    for name, some in (("train", rows), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")

    def make(guard: dict[str, Any] | None, **more: Any) -> DataSettings:
        plain = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "test.jsonl"), "max_length": 2_000}
        return DataSettings.model_validate(plain | {"guard": guard, "cache_dir": str(tmp_path / "cache")} | more)

    return make


@pytest.fixture
def renderer(make_tokenizer: Any) -> Renderer:
    return Renderer(make_tokenizer("chatml"))


@pytest.fixture
def run(settings: Any, renderer: Renderer, tmp_path: Path, progress: Any) -> Callable[..., Prepared]:
    def start(guard: dict[str, Any] | None, **more: Any) -> Prepared:
        return prepare(settings(guard, **more), renderer, seed=0, output_dir=tmp_path / "run", progress=progress)

    return start


def lines(store: Any) -> list[int]:
    return [int(store.row_id(n).rsplit(":", 1)[1]) for n in range(len(store))]


def text_of(store: Any, renderer: Renderer, line: int) -> str:
    ids, _ = store.row(lines(store).index(line))
    return str(renderer._tokenizer.decode(ids))


def test_rows_are_dropped_and_the_files_say_which(run: Any, tmp_path: Path, progress: Any) -> None:
    made = run(OFF | {"duplicates": {"action": "drop"}, "leaks": {"action": "drop"}})
    assert lines(made.train) == [n for n in range(1, 61) if n not in (21, 31)]
    assert made.report["sources"][0]["rows_left_out_by_guard"] == 2
    assert made.report["sources"][0]["rows_read"] == 60
    assert made.report["guard"]["dropped"] == {"rows": 2, "by": {"leaks": 1, "exact_duplicates": 1}}
    assert any("guard: left out 2 of 60 rows" in note for note in progress.notes)
    named = [json.loads(line)["row"] for line in (tmp_path / "run" / "guard_rows.jsonl").read_text().splitlines()]
    assert sorted(name.rsplit(":", 1)[1] for name in named) == ["21", "31"]
    assert json.loads((tmp_path / "run" / "guard_report.json").read_text()) == made.report["guard"]


def test_a_leak_is_refused_before_anything_is_tokenized(run: Any, tmp_path: Path, progress: Any) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:31: holds the same question as .*test\.jsonl:3") as refusal:
        run({})
    assert refusal.value.exit_code == 3
    assert (tmp_path / "run" / "guard_rows.jsonl").is_file()
    assert not any("tokenizing" in task for task in progress.tasks)
    assert not list((tmp_path / "cache").glob("*/train.arrow"))


def test_without_a_guard_nothing_is_checked(run: Any, progress: Any) -> None:
    made = run(None)
    assert len(made.train) == 60
    assert made.report["guard"] is None
    assert not any("checking" in task for task in progress.tasks)


def test_personal_data_is_replaced_in_both_sides(run: Any, renderer: Renderer) -> None:
    made = run(OFF | {"privacy": {"action": "redact"}})
    assert "Mail <EMAIL> or <EMAIL>" in text_of(made.train, renderer, 11)
    assert "Mail <EMAIL>" in text_of(made.eval, renderer, 6)
    assert made.report["guard"]["privacy"]["total"]["findings"] == {"email": 3}


def test_pseudonyms_need_their_key_and_are_the_same_in_a_row(
    run: Any, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMKIT_PSEUDONYM_KEY", raising=False)
    guard = OFF | {"privacy": {"action": "pseudonymize"}}
    with pytest.raises(MissingError, match="LLMKIT_PSEUDONYM_KEY"):
        run(guard)
    monkeypatch.setenv("LLMKIT_PSEUDONYM_KEY", KEY)
    made = run(guard)
    text = text_of(made.train, renderer, 11)
    first, second = text.split("Mail ")[1].split("<")[0].split(" or ")
    assert "corp.co.kr" not in text and "@" in first and first == second.strip()
    assert run(guard).report["cache"]["hit"]
    monkeypatch.setenv("LLMKIT_PSEUDONYM_KEY", KEY + "x")
    assert not run(guard).report["cache"]["hit"], "another key makes other rows"


def test_dropping_personal_data_holds_for_held_out_rows_too(run: Any) -> None:
    made = run(OFF | {"privacy": {"action": "drop"}})
    assert 11 not in lines(made.train) and 6 not in lines(made.eval)
    assert len(made.train) == 59 and len(made.eval) == 11


def test_the_second_start_takes_the_cache_with_its_report(run: Any, tmp_path: Path, progress: Any) -> None:
    guard = OFF | {"duplicates": {"action": "drop"}}
    first = run(guard)
    (tmp_path / "run" / "guard_report.json").unlink()
    tasks = len(progress.tasks)
    second = run(guard)
    assert second.report["cache"]["hit"] and len(progress.tasks) == tasks
    assert second.report["guard"] == first.report["guard"]
    assert lines(second.train) == lines(first.train)
    assert (tmp_path / "run" / "guard_report.json").is_file()


def test_lesson_08_the_cache_key_covers_the_guard_and_its_code(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def hit(guard: dict[str, Any] | None) -> bool:
        return bool(run(guard).report["cache"]["hit"])

    guard = OFF | {"duplicates": {"action": "drop"}}
    assert not hit(None) and not hit(guard)
    assert hit(guard)
    assert hit(guard | {"allow_licenses": ["MIT"]}), "licences decide nothing about tokens"
    assert not hit(OFF | {"duplicates": {"action": "drop", "near": None}})
    monkeypatch.setattr("llmkit.data.prepare.guard_identity", lambda _: ["another version"])
    assert not hit(guard)
    assert hit(None)


def test_a_split_keeps_near_duplicates_on_one_side(
    renderer: Renderer, tmp_path: Path, progress: Any, words: Any
) -> None:
    rows = []
    for row in words.rows(40):
        rows += [
            row,
            row | {"completion": row["completion"] + " more"},
            row | {"completion": "so " + row["completion"]},
        ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings.model_validate(
        {"train": str(path), "eval": {"split": 0.3}, "guard": OFF | {"duplicates": {}}, "max_length": 2_000}
        | {"cache_dir": str(tmp_path / "cache")}
    )
    made = prepare(settings, renderer, seed=1, output_dir=tmp_path / "run", progress=progress)
    assert made.eval is not None and 30 <= len(made.eval) <= 45
    assert not {(n - 1) // 3 for n in lines(made.train)} & {(n - 1) // 3 for n in lines(made.eval)}


def test_weights_draw_from_the_rows_that_stay(run: Any, tmp_path: Path) -> None:
    source = {"path": str(tmp_path / "train.jsonl"), "weight": 2.0}
    made = run(OFF | {"duplicates": {"action": "drop"}}, train=source, eval=None)
    assert len(made.train) == 2 * 59


# --- streams --------------------------------------------------------------------------------------------------------


def first_epoch(stream: TokenStream, rows: int) -> Iterator[int]:
    for _, (row_id, _, _) in zip(range(rows), stream, strict=False):
        yield int(row_id.rsplit(":", 1)[1])


def test_a_stream_leaves_rows_out_and_counts_them(settings: Any, renderer: Renderer) -> None:
    stream = TokenStream(settings(STREAM, streaming=True, shuffle=False), renderer, seed=0)
    assert list(first_epoch(stream, 59)) == [n for n in range(1, 61) if n != 11]
    assert stream.reports[0].rows_guarded == 1 and not stream.reports[0].bad
    assert stream.guarded()["privacy"]["total"]["rows_found"] == 1


def test_a_stream_replaces_personal_data(settings: Any, renderer: Renderer) -> None:
    stream = TokenStream(
        settings(OFF | {"privacy": {"action": "redact"}}, streaming=True, shuffle=False), renderer, seed=0
    )
    found = [renderer._tokenizer.decode(ids) for _, (_, ids, _) in zip(range(12), stream, strict=False)]
    assert "Mail <EMAIL> or <EMAIL>" in found[10]


def test_a_stream_stops_at_a_row_that_is_an_error(settings: Any, renderer: Renderer) -> None:
    guard = OFF | {"quality": {"action": "error", "checks": ["empty", "boilerplate"]}}
    stream = TokenStream(settings(guard, streaming=True), renderer, seed=0)
    assert len(list(first_epoch(stream, 40))) == 40
    guard = OFF | {"privacy": {"action": "error"}}
    with pytest.raises(DataError, match=r"train\.jsonl:11: personal data: email"):
        list(first_epoch(TokenStream(settings(guard, streaming=True), renderer, seed=0), 60))


def test_held_out_rows_of_a_stream_are_cleaned_too(
    settings: Any, renderer: Renderer, tmp_path: Path, progress: Any
) -> None:
    asked = settings(
        OFF | {"privacy": {"action": "redact"}, "quality": {"action": "drop", "checks": ["empty"]}}, streaming=True
    )
    store = prepare_eval(asked, renderer, seed=0, output_dir=tmp_path / "run", progress=progress)
    assert store is not None and len(store) == 12
    assert "Mail <EMAIL>" in text_of(store, renderer, 6)


def test_what_needs_all_rows_is_refused_for_a_stream(settings: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        settings({}, streaming=True)
    for key in ("guard.duplicates", "guard.leaks", "guard.contradictions", "guard.quality.checks", "check-data"):
        assert key in str(refusal.value)


# --- views ----------------------------------------------------------------------------------------------------------


def test_the_view_of_each_kind_of_row() -> None:
    assert view(Text("a document")) == ("", ("a document",))
    assert view(PromptCompletion("why?", "because", system="Be kind.")) == ("why?", ("because",))
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "3"},
    ]
    assert view(Conversation(messages)) == ("one\n1\ntwo\n2\nthree", ("2", "3"))
    call = {"type": "function", "function": {"name": "find", "arguments": {"city": "서울"}}}
    calling = Conversation([messages[1], {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert "서울" in view(calling).answer


def test_every_text_of_a_row_is_rewritten_and_nothing_else() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"mail": "x"}}}
    row = Conversation(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call], "weight": 1}],
        [{"type": "function", "function": {"name": "find", "description": "x"}}],
        row_id="f:1",
    )
    changed = rewrite(row, lambda text: text.replace("x", "y"))
    assert isinstance(changed, Conversation)
    assert changed.messages[0] == {"role": "user", "content": "y"}
    assert changed.messages[1]["tool_calls"][0]["function"]["arguments"] == {"mail": "y"}
    assert changed.messages[1]["weight"] == 1 and changed.tools is not None and changed.row_id == "f:1"
    assert changed.tools[0]["function"]["description"] == "y"
    assert sorted(strings(PromptCompletion("a", "b", system="c"))) == ["a", "b", "c"]


def test_no_cleaner_where_nothing_is_replaced() -> None:
    assert gate.cleaner(GuardSettings()) is None
