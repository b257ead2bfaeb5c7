"""Formats: what a row of each becomes, what is wrong with it, and how the format is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmkit.data.formats import FORMATS, check_columns, convert, detect
from llmkit.data.rows import BadRow, Conversation, PromptCompletion, RawRow, Text
from llmkit.data.settings import Format
from llmkit.errors import DataError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def one(name: str, data: dict[str, Any], columns: dict[str, str] | None = None) -> Any:
    return convert(name, columns or {})(RawRow("f:1", data))


def reason(name: str, data: dict[str, Any], columns: dict[str, str] | None = None) -> str:
    bad = one(name, data, columns)
    assert isinstance(bad, BadRow), bad
    assert bad.row_id == "f:1"
    return bad.reason


def test_formats_of_the_recipe_are_those_of_the_table() -> None:
    assert set(Format.__args__) == set(FORMATS) | {"auto"}


def test_messages_with_tools_calls_and_parts() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": None}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    data = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "add "}, {"type": "text", "text": "1"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {"role": "assistant", "content": "1", "tool_calls": None},
        ],
        "tools": json.dumps(tools),
    }
    row = one("messages", data)
    assert isinstance(row, Conversation)
    assert row.messages[0] == {"role": "user", "content": "add 1"}
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert row.messages[3] == {"role": "assistant", "content": "1"}
    assert row.tools == [{"type": "function", "function": {"name": "add"}}]
    assert one("messages", data | {"tools": tools}).tools == row.tools


def test_sharegpt_roles_calls_and_observations() -> None:
    row = one(
        "sharegpt",
        {
            "system": "S",
            "conversations": [
                {"from": "human", "value": "add"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2!"},
            ],
        },
    )
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_alpaca_with_input_system_and_history() -> None:
    row = one(
        "alpaca",
        {"instruction": "Sum", "input": "1 2", "output": "3", "system": "S", "history": [["q", "a"]]},
    )
    assert [m["content"] for m in row.messages] == ["S", "q", "a", "Sum\n\n1 2", "3"]


def test_prompt_completion_as_text_and_as_messages() -> None:
    row = one("prompt_completion", {"q": "1", "a": "2"}, {"prompt": "q", "completion": "a"})
    assert row == PromptCompletion("1", "2", None, "f:1")
    row = one("prompt_completion", {"prompt": TURNS + TURNS[:1], "completion": TURNS[1:]})
    assert isinstance(row, Conversation) and row.learn_from == 3 and len(row.messages) == 4
    row = one("prompt_completion", {"prompt": TURNS[:1], "completion": "ho"})
    assert row.messages == TURNS and row.learn_from == 1


def test_text() -> None:
    assert one("text", {"body": "x"}, {"text": "body"}) == Text("x", "f:1")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("messages", {}, "column 'messages' is missing (the row has: nothing)"),
        ("messages", {"messages": 3}, "messages is a number, not a list"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": ["x"]}, "message 1 is text, not an object"),
        ("messages", {"messages": [{"role": "king", "content": "x"}]}, "role 'king'"),
        ("messages", {"messages": TURNS[:1]}, "no assistant turn"),
        ("messages", {"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "message 2 (assistant) is empty"),
        ("messages", {"messages": [{"role": "user", "content": 5}, TURNS[1]]}, "message 1 content is a number"),
        ("messages", {"messages": [TURNS[0] | {"content": [{"type": "image_url"}]}, TURNS[1]]}, "only text"),
        ("messages", {"messages": [TURNS[0], TURNS[1] | {"content": "a\0b"}]}, "NUL"),
        ("messages", {"messages": [TURNS[0], TURNS[1] | {"content": "a\ud800b"}]}, "surrogate"),
        ("messages", {"messages": [TURNS[0], TURNS[1] | {"weight": 2}]}, "weight is 2"),
        ("messages", {"messages": [TURNS[0], TURNS[1] | {"weight": 0}]}, "no assistant turn"),
        ("messages", {"messages": TURNS, "tools": "{"}, "tools is not valid JSON"),
        ("messages", {"messages": TURNS, "tools": [3]}, "tools is not a list of objects"),
        ("messages", {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{}]}]}, "no function name"),
        (
            "messages",
            {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "arguments is not valid JSON",
        ),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien'"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "'from'"),
        ("sharegpt", {"conversations": None}, "conversations is null"),
        ("alpaca", {"instruction": "", "input": "", "output": "x"}, "instruction is empty"),
        ("alpaca", {"instruction": "a", "output": ""}, "output is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]}, "not a pair"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["q", 3]]}, "message 2 content is a number"),
        ("prompt_completion", {"prompt": "a"}, "column 'completion' is missing (the row has: prompt)"),
        ("prompt_completion", {"prompt": "a", "completion": float("nan")}, "completion is a number"),
        ("prompt_completion", {"prompt": "a", "completion": " \n"}, "completion is empty"),
        ("prompt_completion", {"prompt": [], "completion": []}, "the row is empty"),
        ("text", {"text": None}, "text is null, not text"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_bad_with_the_reason(name: str, data: dict[str, Any], words: str) -> None:
    assert words in reason(name, data)


@pytest.mark.parametrize(
    ("rows", "columns", "name"),
    [
        ([{"messages": TURNS, "text": "x"}], {}, "messages"),
        ([{"conversations": [{"from": "human", "value": "x"}]}], {}, "sharegpt"),
        ([{"instruction": "a", "input": "", "output": "b"}], {}, "alpaca"),
        ([{"prompt": "a", "completion": "b"}], {}, "prompt_completion"),
        ([{"question": "a", "answer": "b"}], {"prompt": "question", "completion": "answer"}, "prompt_completion"),
        ([{"text": "a"}, {"text": "b"}, {"other": 1}], {}, "text"),
        ([{"body": "a"}], {"text": "body"}, "text"),
    ],
)
def test_format_is_told_from_the_columns(rows: list[dict[str, Any]], columns: dict[str, str], name: str) -> None:
    found, why = detect([RawRow("f:1", row) for row in rows], columns, "data.train")
    assert found == name
    assert "the rows have" in why


def test_format_that_cannot_be_told_is_an_error_with_the_fix() -> None:
    with pytest.raises(DataError, match=r"data\.train: .*answer, question.*data\.format"):
        detect([RawRow("f:1", {"question": "a", "answer": "b"})], {}, "data.train")
    with pytest.raises(DataError, match=r"data\.format: messages"):
        detect([RawRow("f:1", {"conversations": TURNS})], {}, "data.train")


def test_columns_that_the_format_does_not_have_are_refused() -> None:
    with pytest.raises(DataError, match=r"columns names quest; the fields of the format prompt_completion are: prompt"):
        check_columns("prompt_completion", {"quest": "question"}, "data.train")
