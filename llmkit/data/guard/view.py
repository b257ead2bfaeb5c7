"""A row as the guard sees it: what is asked, what is answered, and every text that a person could stand in."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from llmkit.data.rows import Conversation, Message, PromptCompletion, Sample, Text


class View(NamedTuple):
    """``question`` holds all that comes before the last answer, without system messages, which say the same in every
    row; ``answers`` is what is learned, turn by turn. A document is one answer to an empty question."""

    question: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.answers[-1]

    @property
    def whole(self) -> str:
        return f"{self.question}\n{self.answer}" if self.question else self.answer


def view(sample: Sample) -> View:
    if isinstance(sample, Text):
        return View("", (sample.text,))
    if isinstance(sample, PromptCompletion):
        return View(sample.prompt, (sample.completion,))
    last = max(n for n, message in enumerate(sample.messages) if _learned(message, n, sample.learn_from))
    before = [_said(message) for message in sample.messages[:last] if message["role"] not in ("system", "developer")]
    answers = [_said(m) for n, m in enumerate(sample.messages[: last + 1]) if _learned(m, n, sample.learn_from)]
    return View("\n".join(before), tuple(answers))


def _learned(message: Message, number: int, learn_from: int) -> bool:
    return number >= learn_from and message["role"] == "assistant" and bool(message.get("weight", 1))


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    text: str = message["content"]
    return text + (json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "")


def fingerprint(text: str) -> int:
    """64 bits that are equal for texts that differ in case, blanks and Unicode form only."""
    folded = " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).casefold().split())
    return int.from_bytes(hashlib.blake2b(folded.encode(), digest_size=8).digest(), "little")


def strings(sample: Sample) -> Iterator[str]:
    """Every text of a row: messages, their calls and names, tools, the system message."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    rewrite(sample, keep)
    return iter(found)


def rewrite(sample: Sample, change: Callable[[str], str]) -> Sample:
    """The row with every text changed by ``change``; names of keys and roles stay."""
    if isinstance(sample, Text):
        return replace(sample, text=change(sample.text))
    if isinstance(sample, PromptCompletion):
        system = None if sample.system is None else change(sample.system)
        return replace(sample, prompt=change(sample.prompt), completion=change(sample.completion), system=system)
    messages = [_message(message, change) for message in sample.messages]
    tools = None if sample.tools is None else [_inside(tool, change) for tool in sample.tools]
    return Conversation(messages, tools, sample.learn_from, sample.row_id)


def _message(message: Message, change: Callable[[str], str]) -> Message:
    return {key: value if key == "role" else _inside(value, change) for key, value in message.items()}


def _inside(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _inside(item, change) for key, item in value.items()}
    return [_inside(item, change) for item in value] if isinstance(value, list) else value
