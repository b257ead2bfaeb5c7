"""The formats of a row: a table of functions that turn a raw row into a sample, and the detection of the format.

Every function raises ``UnusableError`` with a reason for a row that does not fit; ``convert`` makes a ``BadRow`` of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llmkit.data.rows import BadRow, Conversation, Message, PromptCompletion, RawRow, Sample, Text
from llmkit.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "system": "system", "function_call": "assistant",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip


class UnusableError(ValueError):
    """Why a row cannot be used, in words for the report."""


class Columns:
    """Reads a row's fields under the names that the recipe gave its columns."""

    def __init__(self, row: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._row = row
        self._names = names

    def name(self, field: str) -> str:
        return self._names.get(field, field)

    def get(self, field: str) -> Any:
        return self._row.get(self.name(field))

    def need(self, field: str) -> Any:
        name = self.name(field)
        if name not in self._row:
            present = ", ".join(map(str, list(self._row)[:8])) or "nothing"
            raise UnusableError(f"column {name!r} is missing (the row has: {present})")
        return self._row[name]

    def text(self, field: str) -> str:
        """A string that is not empty."""
        value = _string(self.need(field), self.name(field))
        if not value.strip():
            raise UnusableError(f"{self.name(field)} is empty")
        return value

    def optional(self, field: str) -> str:
        value = self.get(field)
        return "" if value is None else _string(value, self.name(field))


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UnusableError(f"{where} is {_kind(value)}, not text")
    if "\0" in value:
        raise UnusableError(f"{where} contains a NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableError(f"{where} contains half a surrogate pair at character {error.start + 1}") from None
    return value


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _deep_strings(value: Any, where: str, depth: int = 0) -> None:
    """Check every string inside tools or arguments, keys included."""
    if depth > 50:
        raise UnusableError(f"{where} is nested too deeply")
    if isinstance(value, str):
        _string(value, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _deep_strings(key, where, depth + 1)
            _deep_strings(item, where, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _deep_strings(item, where, depth + 1)
    elif value is not None and not isinstance(value, bool | int | float):
        raise UnusableError(f"{where} holds {_kind(value)}, which JSON has not")


def _loads(value: str, where: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"{where} is not valid JSON: {error}") from None


def _without_nulls(value: Any) -> Any:
    """Parquet and Arrow fill absent fields with nulls: drop them from mappings."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = _loads(value, "tools") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UnusableError("tools is not a list of objects")
    _deep_strings(value, "tools")
    return [_without_nulls(tool) for tool in value]


def _content(value: Any, where: str) -> str:
    """A string, null, or a list of parts of type text."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return _string(value, where)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise UnusableError(f"{where} has a part of type {kind!r}; only text is learned")
        texts.append(_string(part.get("text"), f"{where} (text part)"))
    return "".join(texts)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UnusableError(f"{where} has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loads(arguments, f"{where} arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise UnusableError(f"{where} arguments are {_kind(arguments)}, not an object")
    _deep_strings([function["name"], arguments], where)
    made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        made["id"] = _string(call["id"], where)
    return made


def _message(raw: Any, index: int) -> Message:
    where = f"message {index + 1}"
    if not isinstance(raw, dict):
        raise UnusableError(f"{where} is {_kind(raw)}, not an object with role and content")
    role = raw.get("role")
    role = "tool" if role == "function" else role
    if role not in ROLES:
        raise UnusableError(f"{where} has the role {role!r}; known: {', '.join(ROLES)}")
    message: Message = {"role": role, "content": _content(raw.get("content"), f"{where} content")}
    calls = raw.get("tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise UnusableError(f"{where} tool_calls must be a list in an assistant message")
        message["tool_calls"] = [_tool_call(call, f"{where} tool call {n + 1}") for n, call in enumerate(calls)]
    for key in ("name", "tool_call_id", "reasoning_content"):
        if raw.get(key) is not None:
            message[key] = _string(raw[key], f"{where} {key}")
    weight = raw.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise UnusableError(f"{where} weight is {weight!r}; allowed are 0 (not learned) and 1")
        message["weight"] = weight
    if not message["content"].strip() and role in ("user", "assistant") and "tool_calls" not in message:
        raise UnusableError(f"{where} ({role}) is empty")
    return message


def _conversation(raw: Any, where: str, tools: Any, row_id: str, learn_from: int = 0) -> Conversation:
    if isinstance(raw, str):
        raw = _loads(raw, where)
    if not isinstance(raw, list):
        raise UnusableError(f"{where} is {_kind(raw)}, not a list of messages")
    if not raw:
        raise UnusableError(f"{where} is empty")
    messages = [_message(message, index) for index, message in enumerate(raw)]
    messages = [m for i, m in enumerate(messages) if m["content"].strip() or m["role"] != "system" or i > 0]
    learn_from -= len(raw) - len(messages)
    learned = [m for m in messages[max(learn_from, 0) :] if m["role"] == "assistant" and m.get("weight", 1)]
    if not learned:
        raise UnusableError(f"{where} has no assistant turn to learn")
    return Conversation(messages, _tools(tools), max(learn_from, 0), row_id)


def messages(row: Columns, row_id: str) -> Sample:
    """OpenAI's form: ``messages`` of role and content, and ``tools``."""
    return _conversation(row.need("messages"), row.name("messages"), row.get("tools"), row_id)


def sharegpt(row: Columns, row_id: str) -> Sample:
    """``conversations`` of from and value; function_call and observation are a tool's call and answer."""
    name = row.name("conversations")
    raw = row.need("conversations")
    raw = _loads(raw, name) if isinstance(raw, str) else raw
    if not isinstance(raw, list):
        raise UnusableError(f"{name} is {_kind(raw)}, not a list of turns")
    turns = [_sharegpt_turn(turn, index, row.name("from"), row.name("value")) for index, turn in enumerate(raw)]
    system = row.optional("system")
    if system.strip() and not (turns and turns[0]["role"] == "system"):
        turns.insert(0, {"role": "system", "content": system})
    return _conversation(turns, name, row.get("tools"), row_id)


def _sharegpt_turn(turn: Any, index: int, role_key: str, text_key: str) -> Message:
    where = f"turn {index + 1}"
    if not isinstance(turn, dict) or role_key not in turn:
        raise UnusableError(f"{where} is not an object with {role_key!r} and {text_key!r}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise UnusableError(f"{where} is from {role!r}; known: {', '.join(_SHAREGPT_ROLES)}")
    text = _string(turn.get(text_key), f"{where} {text_key}")
    if role != "function_call":
        return {"role": _SHAREGPT_ROLES[role], "content": text}
    calls = _loads(text, f"{where} (function_call)")
    return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def alpaca(row: Columns, row_id: str) -> Sample:
    """``instruction``, ``input``, ``output``, and perhaps ``system`` and ``history`` (pairs of question and answer)."""
    instruction, extra = row.optional("instruction"), row.optional("input")
    row.need("instruction")
    prompt = "\n\n".join(part for part in (instruction, extra) if part.strip())
    if not prompt:
        raise UnusableError(f"{row.name('instruction')} is empty")
    turns: list[Message] = []
    system = row.optional("system")
    if system.strip():
        turns.append({"role": "system", "content": system})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise UnusableError(f"{row.name('history')} is {_kind(history)}, not a list of pairs")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnusableError(f"{row.name('history')} has an entry that is not a pair of question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": row.text("output")}]
    return _conversation(turns, "the row", None, row_id)


def prompt_completion(row: Columns, row_id: str) -> Sample:
    """``prompt`` and ``completion``, both text or lists of messages; only the completion is learned."""
    prompt, completion = row.need("prompt"), row.need("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        head = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        tail = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return _conversation(head + tail, "the row", row.get("tools"), row_id, learn_from=len(head))
    system = row.optional("system")
    return PromptCompletion(row.text("prompt"), row.text("completion"), system if system.strip() else None, row_id)


def text(row: Columns, row_id: str) -> Sample:
    """``text``: a document, every token learned."""
    return Text(row.text("text"), row_id)


class FormatSpec(NamedTuple):
    """``fields`` can be renamed by ``columns``; a row that has all of ``needs`` is taken to be of this format."""

    convert: Callable[[Columns, str], Sample]
    fields: tuple[str, ...]
    needs: tuple[str, ...]


FORMATS: dict[str, FormatSpec] = {
    "messages": FormatSpec(messages, ("messages", "tools"), ("messages",)),
    "sharegpt": FormatSpec(sharegpt, ("conversations", "from", "value", "system", "tools"), ("conversations",)),
    "alpaca": FormatSpec(alpaca, ("instruction", "input", "output", "system", "history"), ("instruction", "output")),
    "prompt_completion": FormatSpec(
        prompt_completion, ("prompt", "completion", "system", "tools"), ("prompt", "completion")
    ),
    "text": FormatSpec(text, ("text",), ("text",)),
}


def shorten(reason: str) -> str:
    """A reason of at most 300 characters, whatever a row put into it."""
    return reason if len(reason) <= 300 else f"{reason[:200]} … {reason[-80:]}"


def check_columns(name: str, columns: Mapping[str, str], key: str) -> None:
    """Raises DataError for a field of ``data.columns`` that the format does not have."""
    spec = FORMATS[name]
    unknown = [field for field in columns if field not in spec.fields]
    if unknown:
        fields = ", ".join(spec.fields)
        raise DataError(f"{key}: columns names {', '.join(unknown)}; the fields of the format {name} are: {fields}.")


def convert(name: str, columns: Mapping[str, str]) -> Callable[[RawRow], Sample | BadRow]:
    """The function that turns a raw row into a sample, or into a bad row with the reason."""
    make = FORMATS[name].convert

    def one(row: RawRow) -> Sample | BadRow:
        try:
            return make(Columns(row.data, columns), row.row_id)
        except UnusableError as reason:
            return BadRow(row.row_id, shorten(str(reason)))

    return one


def detect(rows: Sequence[RawRow], columns: Mapping[str, str], key: str) -> tuple[str, str]:
    """The format of these first rows and why, in words. Raises DataError when no format fits."""
    names = {name for row in rows for name in row.data}
    common = {name for name in names if 2 * sum(name in row.data for row in rows) > len(rows)}
    for format_name, spec in FORMATS.items():
        if any(field not in spec.fields for field in columns):
            continue
        wanted = [columns.get(field, field) for field in spec.needs]
        if all(name in common for name in wanted):
            if format_name == "sharegpt" and _role_content(rows, wanted[0]):
                raise DataError(
                    f"{key}: {wanted[0]} holds messages with role and content: "
                    f"set data.format: messages and data.columns: {{messages: {wanted[0]}}}."
                )
            return format_name, f"the rows have {' and '.join(wanted)}"
    found = ", ".join(sorted(map(str, names))[:12]) or "no columns"
    raise DataError(
        f"{key}: the format cannot be told from the columns ({found}). Set data.format to one of "
        f"{', '.join(FORMATS)}, and data.columns where your columns have other names."
    )


def _role_content(rows: Sequence[RawRow], name: str) -> bool:
    lists = [row.data[name] for row in rows if isinstance(row.data.get(name), list) and row.data[name]]
    turns: list[Any] = lists[0] if lists else [{}]
    return isinstance(turns[0], dict) and "role" in turns[0] and "content" in turns[0]
