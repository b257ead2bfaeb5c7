"""Preparation from files to token stores: nothing lost in silence, tokenized once, shared and reused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmkit.data import prepare as module
from llmkit.data.prepare import Prepared, prepare, prepare_eval
from llmkit.data.render import Renderer
from llmkit.data.settings import DataSettings, EvalSplitSettings, SourceSettings
from llmkit.errors import DataError

Make = Callable[[str], PreTrainedTokenizerFast]
Write = Callable[..., str]


def pairs(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {i} + 1?", "completion": f"It is {i + 1}."} for i in range(start, start + n)]


@pytest.fixture
def run(tmp_path: Path, make_tokenizer: Make, progress: Any) -> Callable[..., Prepared]:
    """Prepare with settings; a fresh renderer for a tokenizer of the given name."""

    def run_it(
        tokenizer: str = "chatml", seed: int = 0, render: dict[str, Any] | None = None, **settings: Any
    ) -> Prepared:
        data = DataSettings(**({"cache_dir": str(tmp_path / "cache"), "max_length": 128} | settings))
        renderer = Renderer(make_tokenizer(tokenizer), **(render or {}))
        return prepare(data, renderer, seed=seed, output_dir=tmp_path / "out", progress=progress)

    return run_it


def ids(store: Any) -> list[str]:
    return [store.row_id(index).rsplit("/", 1)[-1] for index in range(len(store))]


def report_of(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "data_report.json").read_text(encoding="utf-8"))
    return found


def test_rows_become_a_store_a_report_and_a_histogram(
    run: Any, write_jsonl: Write, tmp_path: Path, progress: Any, make_tokenizer: Make
) -> None:
    made = run(train=write_jsonl(pairs(20)), packing=True)
    assert len(made.train) == 20 and made.eval is None
    assert ids(made.train)[:2] == ["rows.jsonl:1", "rows.jsonl:2"]
    tokenizer = make_tokenizer("chatml")
    row, labels = made.train.row(3)
    assert "What is 3 + 1?" in tokenizer.decode(row)
    assert tokenizer.decode(labels[labels >= 0]) == "It is 4.<|im_end|>"
    report = report_of(tmp_path)
    assert report["train"]["rows"] == 20
    assert report["train"]["tokens"] == made.train.tokens == int(made.train.lengths.sum())
    assert report["train"]["supervised_tokens"] == int(np.count_nonzero(made.train.labels != -100))
    assert report["sources"][0]["format"] == "prompt_completion"
    assert report["packing"]["efficiency"] > 0.5
    assert (tmp_path / "out" / "token_lengths.png").read_bytes().startswith(b"\x89PNG")
    assert any("format prompt_completion, because the rows have prompt and completion" in n for n in progress.notes)
    assert made.digests == report["digests"] and len(made.digests) == 1


def test_lesson_01_rows_without_anything_to_learn_are_refused_with_a_count(run: Any, write_jsonl: Write) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    path = write_jsonl([{"messages": [{"role": "user", "content": "a"}]}] * 5)
    with pytest.raises(DataError, match=r"5 of 5 rows cannot be learned from"):
        run(train=path)
    with pytest.raises(DataError, match=r"none of 5 rows is left.*5 × messages has no assistant turn"):
        run(train=path, on_bad_row="drop")
    with pytest.raises(DataError):
        run(train=write_jsonl(pairs(3)), render={"chat_template": template})


def test_lesson_01_rows_masked_by_cutting_are_counted_and_all_of_them_refused(run: Any, write_jsonl: Write) -> None:
    long = [{"prompt": "word " * 100, "completion": "x"}] * 4
    with pytest.raises(
        DataError, match=r"4 of 4 rows.*[\s\S]*nothing left to learn after cutting at data.max_length: 16"
    ):
        run(train=write_jsonl(long), max_length=16, on_too_long="truncate")
    with pytest.raises(DataError, match=r"none of 4 rows is left to learn from: 4 × nothing left to learn"):
        run(train=write_jsonl(long), max_length=16, on_too_long="truncate", on_bad_row="drop")


def test_lesson_02_too_long_rows_are_an_error_that_names_row_and_length(
    run: Any, write_jsonl: Write, tmp_path: Path, make_tokenizer: Make
) -> None:
    rows = pairs(10)
    for place in (2, 5, 6, 8):
        rows[place] = {"prompt": "q", "completion": "word " * (40 + place)}
    with pytest.raises(DataError) as caught:
        run(train=write_jsonl(rows), max_length=64)
    message = str(caught.value)
    lengths = [entry["tokens"] for entry in report_of(tmp_path)["sources"][0]["too_long"]]
    assert message.startswith("4 of 10 rows are longer than data.max_length: 64.")
    assert f"rows.jsonl:3 ({lengths[0]:,} tokens)" in message
    assert f"the longest: {tmp_path}/rows.jsonl:9 ({max(lengths):,} tokens)" in message
    assert "drop" in message and "truncate" in message
    assert caught.value.exit_code == 3
    assert len(lengths) == 4, "all rows in question are in the report"


def test_lesson_02_drop_and_truncate_do_and_say_so(
    run: Any, write_jsonl: Write, tmp_path: Path, progress: Any, make_tokenizer: Make
) -> None:
    rows = pairs(5)
    rows[2] = {"prompt": "q", "completion": "word " * 100}
    path = write_jsonl(rows)
    dropped = run(train=path, max_length=64, on_too_long="drop")
    assert ids(dropped.train) == [f"rows.jsonl:{n}" for n in (1, 2, 4, 5)]
    assert any("left out 1 rows longer than 64" in note for note in progress.notes)
    assert report_of(tmp_path)["sources"][0]["rows_dropped"] == 1
    cut = run(train=path, max_length=64, on_too_long="truncate")
    assert len(cut.train) == 5 and cut.train.lengths.tolist()[2] == 64
    assert int(cut.train.row(2)[1][-1]) != make_tokenizer("chatml").eos_token_id
    assert any("lost the end of the answer and its stop token" in note for note in progress.notes)
    assert report_of(tmp_path)["sources"][0]["rows_truncated"] == 1


def test_lesson_02_gsm8k_at_512_names_exactly_seven_rows(
    demo_model: Path, shared_data: Path, tmp_path: Path, progress: Any
) -> None:
    settings = DataSettings(
        train=str(shared_data / "gsm8k" / "train.jsonl"),
        format="prompt_completion",
        columns={"prompt": "question", "completion": "answer"},
        max_length=512,
        cache_dir=str(tmp_path / "cache"),
    )
    renderer = Renderer(AutoTokenizer.from_pretrained(demo_model))
    with pytest.raises(DataError, match=r"^7 of 7,473 rows are longer than data\.max_length: 512"):
        prepare(settings, renderer, seed=0, output_dir=tmp_path / "out", progress=progress)
    assert len(report_of(tmp_path)["sources"][0]["too_long"]) == 7


def test_bad_rows_are_an_error_that_shows_three_or_dropped_and_listed(
    run: Any, write_jsonl: Write, tmp_path: Path
) -> None:
    rows: list[object] = [
        *pairs(6),
        '{"prompt": "a", ',
        {"prompt": 3, "completion": "x"},
        {"x": 1},
        {"prompt": "a", "completion": ""},
    ]
    path = write_jsonl(rows)
    with pytest.raises(DataError) as caught:
        run(train=path)
    message = str(caught.value)
    assert message.startswith("4 of 10 rows cannot be learned from")
    assert "rows.jsonl:7: invalid JSON at column" in message
    assert "rows.jsonl:9: column 'prompt' is missing (the row has: x)" in message
    assert "rows.jsonl:10" not in message
    assert "data.on_bad_row: drop" in message
    listed = report_of(tmp_path)["sources"][0]["bad"]
    assert sorted(row.rsplit(":", 1)[1] for entry in listed for row in entry["rows"]) == ["10", "7", "8", "9"]
    made = run(train=path, on_bad_row="drop")
    assert len(made.train) == 6
    assert report_of(tmp_path)["sources"][0]["rows_bad"] == 4


def test_bad_and_too_long_rows_come_in_one_message(run: Any, write_jsonl: Write) -> None:
    rows: list[object] = [*pairs(2), "{", {"prompt": "q", "completion": "word " * 100}]
    with pytest.raises(DataError, match=r"1 of 4 rows cannot[\s\S]*1 of 4 rows is longer"):
        run(train=write_jsonl(rows), max_length=64)


def test_source_without_a_row_is_an_error(run: Any, write_jsonl: Write) -> None:
    with pytest.raises(DataError, match=r"data\.train\[1\]: .*empty\.jsonl has no rows"):
        run(train=[write_jsonl(pairs(3)), write_jsonl([], "empty.jsonl")])


def test_lesson_08_cache_key_covers_data_template_tokenizer_mask_rule_and_code(
    run: Any, write_jsonl: Write, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(pairs(8))

    def hit(**settings: Any) -> bool:
        found: bool = run(train=path, **settings).report["cache"]["hit"]
        return found

    assert not hit()
    assert hit()
    assert hit(packing=True, shuffle=False), "what does not change tokens does not change the key"
    assert hit(seed=5), "the seed decides nothing here"
    assert not hit(max_length=127)
    assert not hit(render={"supervise": "last"}, supervise="last")
    assert not hit(render={"chat_template": "chatml"})
    assert not hit(render={"system": "Be kind."})
    assert not hit(tokenizer="chatml_base_eos")
    assert not hit(eval=EvalSplitSettings(split=0.25))
    assert not hit(eval=EvalSplitSettings(split=0.25), seed=5)
    write_jsonl(pairs(8, start=1))
    assert not hit()
    assert hit()
    monkeypatch.setattr(module, "_code_version", lambda: "another")
    assert not hit()


@pytest.mark.parametrize("damage", ["cut", "empty", "report", "gone"])
def test_lesson_08_damaged_cache_is_made_again_and_said(
    damage: str, run: Any, write_jsonl: Write, progress: Any
) -> None:
    path = write_jsonl(pairs(8))
    first = run(train=path)
    tokens = first.train.input_ids.tolist()
    folder = Path(first.report["cache"]["folder"])
    store = folder / "train.arrow"
    if damage == "cut":
        raw = store.read_bytes()
        store.unlink()
        store.write_bytes(raw[:-100])
    elif damage == "empty":
        store.unlink()
        store.touch()
    elif damage == "report":
        (folder / "data_report.json").write_text('{"train":', encoding="utf-8")
    else:
        store.unlink()
    again = run(train=path)
    assert not again.report["cache"]["hit"]
    assert again.train.input_ids.tolist() == tokens
    assert any("token cache is damaged and made again" in note for note in progress.notes)
    assert run(train=path).report["cache"]["hit"]


_WORKER = """
import sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from contextlib import contextmanager
from llmkit.data.prepare import prepare
from llmkit.data.render import Renderer
from llmkit.data.settings import DataSettings

class Quiet:
    def note(self, text): pass
    @contextmanager
    def task(self, what, total=None, unit="rows"):
        class Task:
            def advance(self, n=1): pass
        yield Task()

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
settings = DataSettings(train=sys.argv[2], cache_dir=sys.argv[3], max_length=128)
rank = int(sys.argv[5])
made = prepare(settings, Renderer(tokenizer), seed=0, output_dir=Path(sys.argv[4]), progress=Quiet(), is_main=rank == 0)
print(made.report["cache"]["hit"], made.train.tokens)
"""


def test_lesson_09_ranks_tokenize_once(write_jsonl: Write, tmp_path: Path, make_tokenizer: Make) -> None:
    path = write_jsonl(pairs(3000))
    make_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    argv = [
        sys.executable,
        "-c",
        _WORKER,
        str(tmp_path / "tokenizer"),
        path,
        str(tmp_path / "cache"),
        str(tmp_path / "out"),
    ]
    ranks = [subprocess.Popen([*argv, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(3)]
    answers = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert sorted(answer[0] for answer in answers) == ["False", "True", "True"]
    assert len({answer[1] for answer in answers}) == 1
    assert (tmp_path / "out" / "data_report.json").is_file()


def test_lesson_09_half_made_cache_of_a_killed_process_is_not_used(run: Any, write_jsonl: Write, progress: Any) -> None:
    path = write_jsonl(pairs(8))
    first = run(train=path)
    folder = Path(first.report["cache"]["folder"])
    (folder / "data_report.json").unlink()
    (folder / "work").mkdir()
    (folder / "work" / "train.ids").write_bytes(b"half")
    again = run(train=path)
    assert not again.report["cache"]["hit"] and len(again.train) == 8
    assert not (folder / "work").exists()


def test_eval_split_is_seeded_exact_and_keeps_duplicates_together(run: Any, write_jsonl: Write) -> None:
    rows = pairs(40) + pairs(40) + pairs(20, start=100)
    path = write_jsonl(rows)
    made = run(train=path, eval=EvalSplitSettings(split=0.2))
    assert made.eval is not None
    assert len(made.train) + len(made.eval) == 100
    assert 20 <= len(made.eval) <= 21
    train = {made.train.row(i)[0].tobytes() for i in range(len(made.train))}
    assert not any(made.eval.row(i)[0].tobytes() in train for i in range(len(made.eval)))
    same = run(train=path, eval=EvalSplitSettings(split=0.2), cache_dir=str(Path(path).parent / "other"))
    assert ids(same.eval) == ids(made.eval)
    other = run(train=path, eval=EvalSplitSettings(split=0.2), seed=1)
    assert ids(other.eval) != ids(made.eval)
    with pytest.raises(DataError, match="at least two different rows"):
        run(train=write_jsonl(pairs(1) * 5, "same.jsonl"), eval=EvalSplitSettings(split=0.2))


def test_held_out_rows_that_are_training_rows_are_counted(run: Any, write_jsonl: Write, progress: Any) -> None:
    made = run(train=write_jsonl(pairs(10)), eval=write_jsonl(pairs(4, start=8), "held.jsonl"))
    assert made.report["eval_rows_also_in_train"] == 2
    assert any(
        "warning: 2 held-out rows are training rows too" in note and "held.jsonl:1" in note for note in progress.notes
    )
    assert len(made.eval) == 4


def test_weights_repeat_and_thin_out_sources(run: Any, write_jsonl: Write) -> None:
    first, second = write_jsonl(pairs(10), "a.jsonl"), write_jsonl(pairs(101, start=50), "b.jsonl")
    sources = [SourceSettings(path=first, weight=2.5), SourceSettings(path=second, weight=0.5)]
    made = run(train=sources)
    names = ids(made.train)
    assert sum(name.startswith("a.") for name in names) == 25
    assert all(names.count(f"a.jsonl:{n}") in (2, 3) for n in range(1, 11))
    thin = [name for name in names if name.startswith("b.")]
    assert len(thin) in (50, 51) and len(set(thin)) == len(thin)
    assert made.report["sources"][1]["rows_not_drawn"] == 101 - len(thin)
    assert ids(run(train=sources, cache_dir=str(Path(first).parent / "other")).train) == names
    assert ids(run(train=sources, seed=9).train) != names


def test_documents_are_split_never_cut(run: Any, tmp_path: Path, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("llama3")
    text = "one two three four " * 40
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    made = run(tokenizer="llama3", train=str(tmp_path / "book.txt"), max_length=50)
    assert made.report["sources"][0]["documents_split"] == 1
    assert made.report["sources"][0]["format"] == "text"
    pieces = [made.train.row(i)[0].tolist() for i in range(len(made.train))]
    assert all(2 <= len(piece) <= 50 for piece in pieces) and len(pieces) > 2
    whole = [index for piece in pieces for index in piece]
    assert whole == [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert ids(made.train)[0] == "book.txt:1#1"
    assert made.train.supervised == len(whole)


@pytest.mark.parametrize("size", range(95, 106))
def test_last_piece_of_a_document_has_something_to_learn(size: int) -> None:
    from llmkit.data.pipeline import split_document
    from llmkit.data.rows import Encoded

    tokens = np.arange(size, dtype=np.int32)
    pieces = split_document(Encoded("f:1", tokens, tokens, True), 50)
    assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == tokens.tolist()
    assert min(len(piece.input_ids) for piece in pieces) >= 2
    assert max(len(piece.input_ids) for piece in pieces) <= 50


def test_seq2seq_rows_have_targets_of_their_own_length(run: Any, write_jsonl: Write, make_tokenizer: Make) -> None:
    rows = [{"prompt": "What is the capital", "completion": "Paris"}, {"prompt": "a", "completion": "b c d e"}]
    made = run(tokenizer="t5", train=write_jsonl(rows), render={"seq2seq": True})
    tokenizer = make_tokenizer("t5")
    for index, row in enumerate(rows):
        source, target = made.train.row(index)
        assert source.tolist() == tokenizer(row["prompt"])["input_ids"]
        assert target.tolist() == tokenizer(row["completion"])["input_ids"]
    with pytest.raises(DataError, match=r"longer than data\.max_length: 8"):
        run(
            tokenizer="t5",
            train=write_jsonl([{"prompt": "a", "completion": "b " * 40}]),
            render={"seq2seq": True},
            max_length=8,
        )


def test_stop_token_found_in_rows_is_known_after_a_cache_hit_too(
    write_jsonl: Write, tmp_path: Path, make_tokenizer: Make, progress: Any
) -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('needs a system message') }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    path = write_jsonl([row | {"system": "S"} for row in pairs(3)])
    tokenizer = make_tokenizer("chatml_base_eos")
    settings = DataSettings(train=path, cache_dir=str(tmp_path / "cache"), max_length=128)
    for hit in (False, True):
        renderer = Renderer(tokenizer, chat_template=template)
        assert renderer.stop_ids == (tokenizer.eos_token_id,)
        made = prepare(settings, renderer, seed=0, output_dir=tmp_path / "out", progress=progress)
        assert made.report["cache"]["hit"] is hit
        assert renderer.stop_ids == (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_held_out_rows_alone_for_streaming(
    write_jsonl: Write, tmp_path: Path, make_tokenizer: Make, progress: Any
) -> None:
    renderer = Renderer(make_tokenizer("chatml"))
    path = write_jsonl(pairs(5))
    common: dict[str, Any] = {"seed": 0, "output_dir": tmp_path / "out", "progress": progress}
    settings = DataSettings(train=path, eval=path, cache_dir=str(tmp_path / "cache"), streaming=True, max_length=128)
    store = prepare_eval(settings, renderer, **common)
    assert store is not None and len(store) == 5
    assert [line.split(",")[0] for line in progress.notes][-1] == "eval: 5 rows"
    assert not any("train" in line for line in progress.notes)
    (source,) = json.loads((tmp_path / "out" / "data_report.json").read_text())["sources"]
    assert source["key"] == "data.eval"
    with pytest.raises(DataError, match=r"data\.eval: .*gone\.jsonl does not exist"):
        prepare_eval(settings.model_copy(update={"eval": str(tmp_path / "gone.jsonl")}), renderer, **common)
    assert prepare_eval(settings.model_copy(update={"eval": None}), renderer, **common) is None
    with pytest.raises(DataError, match="name a source"):
        prepare_eval(settings.model_copy(update={"eval": EvalSplitSettings(split=0.5)}), renderer, **common)


def test_second_run_takes_well_under_a_second(run: Any, write_jsonl: Write) -> None:
    import time

    path = write_jsonl(pairs(20_000))
    assert run(train=path).train.tokens > 400_000
    begin = time.perf_counter()
    assert run(train=path, packing=True).report["cache"]["hit"]
    assert time.perf_counter() - begin < 1.0
    shutil.rmtree(Path(path).parent / "cache")
