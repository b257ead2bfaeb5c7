"""Streaming: the same order every time, any rank, any restart; nothing bad in silence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llmkit.data import stream as module
from llmkit.data.render import Renderer
from llmkit.data.settings import DataSettings, SourceSettings
from llmkit.data.stream import TokenStream
from llmkit.errors import DataError

Make = Callable[[str], PreTrainedTokenizerFast]
Write = Callable[..., str]


def texts(n: int, word: str = "row") -> list[dict[str, str]]:
    return [{"text": f"{word} number {i}"} for i in range(n)]


@pytest.fixture
def open_stream(make_tokenizer: Make) -> Callable[..., TokenStream]:
    def make(seed: int = 0, rank: int = 0, world_size: int = 1, **settings: Any) -> TokenStream:
        data = DataSettings(**({"streaming": True, "max_length": 64} | settings))
        return TokenStream(data, Renderer(make_tokenizer("chatml")), seed, rank=rank, world_size=world_size)

    return make


def take(stream: TokenStream, n: int) -> list[str]:
    return [row_id.rsplit("/", 1)[-1] for row_id, _, _ in islice(stream, n)]


def test_every_row_once_an_epoch_in_an_order_that_repeats(
    open_stream: Any, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUFFER", 50)
    path = write_jsonl(texts(300))
    stream = open_stream(train=path)
    two = take(stream, 600)
    assert sorted(two[:300]) == sorted(two[300:]) == sorted(f"rows.jsonl:{n}" for n in range(1, 301))
    assert two[:300] != two[300:] and two[:300] != sorted(two[:300])
    assert take(stream, 600) == two == take(open_stream(train=path), 600)
    assert take(open_stream(train=path, seed=1), 300) != two[:300]
    assert take(open_stream(train=path, shuffle=False), 3) == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]


def test_skip_continues_where_a_run_stopped(open_stream: Any, write_jsonl: Write) -> None:
    path = write_jsonl(texts(40))
    whole = take(open_stream(train=path), 100)
    assert take(open_stream(train=path).skip(57), 43) == whole[57:]


def test_ranks_share_the_rows(open_stream: Any, write_jsonl: Write) -> None:
    path = write_jsonl(texts(100))
    shards = [take(open_stream(train=path, rank=rank, world_size=4), 25) for rank in range(4)]
    assert sorted(row for shard in shards for row in shard) == sorted(f"rows.jsonl:{n}" for n in range(1, 101))


def test_sources_are_mixed_by_weight(open_stream: Any, write_jsonl: Write) -> None:
    a, b = write_jsonl(texts(200), "a.jsonl"), write_jsonl(texts(200), "b.jsonl")
    sources = [SourceSettings(path=a, weight=2.0), SourceSettings(path=b, weight=0.5)]
    epoch = take(open_stream(train=sources, shuffle=False), 500)
    assert sum(name.startswith("a.") for name in epoch) == 400
    assert sum(name.startswith("b.") for name in epoch[:250]) in range(25, 76)


def test_bad_and_too_long_rows_are_handled_as_the_recipe_says(open_stream: Any, write_jsonl: Write) -> None:
    rows: list[object] = [{"prompt": "a", "completion": "b"}] * 5 + ["{", {"prompt": "a", "completion": "word " * 90}]
    path = write_jsonl(rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:6: invalid JSON"):
        take(open_stream(train=path, shuffle=False, on_too_long="drop"), 5)
    with pytest.raises(DataError, match=r"longer than data\.max_length: 64"):
        take(open_stream(train=path, shuffle=False, on_bad_row="drop"), 5)
    stream = open_stream(train=path, shuffle=False, on_bad_row="drop", on_too_long="drop")
    assert take(stream, 5) == [f"rows.jsonl:{n}" for n in range(1, 6)]
    assert len(stream.reports[0].bad) == 1 and len(stream.reports[0].too_long) == 1


def test_an_epoch_without_a_row_ends_in_an_error_not_in_a_loop(open_stream: Any, write_jsonl: Write) -> None:
    with pytest.raises(DataError, match="none is left to learn from"):
        take(open_stream(train=write_jsonl(["{", "{"]), on_bad_row="drop"), 1)
    with pytest.raises(DataError, match="has no rows"):
        take(open_stream(train=write_jsonl([], "empty.jsonl")), 1)


def test_long_documents_are_split(open_stream: Any, write_jsonl: Write) -> None:
    path = write_jsonl([{"text": "one two three " * 60}])
    names = take(open_stream(train=path), 3)
    assert names == ["rows.jsonl:1#1", "rows.jsonl:1#2", "rows.jsonl:1#3"]
