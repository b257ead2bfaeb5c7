"""``llmkit chat``: talk to a model in the terminal, with the renderer that training used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from llmkit.errors import DataError
from llmkit.inference.engines import trained_system
from llmkit.inference.generate import Generator, Message, Sampling, open_generator

HELP = "/reset forgets the conversation, /system TEXT sets the system message and begins anew, /exit leaves"


def chat_loop(
    path: str | Path,
    *,
    system: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    out: TextIO | None = None,
    in_: TextIO | None = None,
) -> None:
    """Answer ``prompt`` and return, or read questions from ``in_`` until it ends, writing answers to ``out`` as they come.

    With a terminal the turns make one conversation; without one every line is a question of its own. ``system`` None
    takes the one that the run was trained with, "" none. Raises MissingError where ``path`` has no model, UsageError or
    DataError for a prompt or setting that cannot be answered.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if system is None:
        system = trained_system(path)
    generator = open_generator(path)
    chat = Conversation(generator, sampling, out or sys.stdout, system or None)
    if prompt is not None:
        chat.ask(prompt)
    else:
        _read(chat, in_ or sys.stdin)


class Conversation:
    """A conversation with a model: its history, and how it is shown."""

    def __init__(self, generator: Generator, sampling: Sampling, out: TextIO, system: str | None) -> None:
        self._generator, self._sampling, self._out, self._system = generator, sampling, out, system
        self.templated = generator.renderer.chat_template is not None
        self.history: list[Message] = []

    def ask(self, question: str) -> str:
        """Put a question, stream the answer, and remember both. Raises DataError for a question without room."""
        messages = [*self.history, {"role": "user", "content": question}]
        asked = self._fit(messages) if self.templated else question
        answer = self._generator.generate(asked, self._sampling, on_text=self._show)
        self._show(
            "\n" if answer.finished else f"\n[cut after {len(answer.ids)} tokens: --max-new-tokens allows more]\n"
        )
        self.history = [*messages, {"role": "assistant", "content": answer.text}]
        return answer.text

    def reset(self) -> None:
        self.history = []

    def set_system(self, text: str) -> None:
        self._system = text or None
        self.reset()

    def note(self, text: str) -> None:
        self._show(f"{text}\n")

    def _fit(self, messages: list[Message]) -> list[Message]:
        """The conversation with its oldest exchanges left out (and said so) where it outgrew the model's context."""
        dropped = 0
        while True:
            whole = [{"role": "system", "content": self._system}, *messages] if self._system else messages
            room = self._generator.context
            size = len(self._generator.prompt_ids(whole))
            if room is None or size + 1 < room or len(messages) < 3:
                break
            del messages[:2]
            dropped += 1
        if dropped:
            self.note(
                f"[the conversation outgrew the model's {room} tokens: the oldest {dropped} exchanges are left out]"
            )
        return whole

    def _show(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _read(chat: Conversation, source: TextIO) -> None:
    terminal = source.isatty()
    if terminal:
        chat.note(HELP)
        if not chat.templated:
            chat.note("This model has no chat template: it continues your text")
    while True:
        if terminal:
            chat._show("> ")
        try:
            line = source.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            return
        if line.strip() and not _turn(chat, line.strip(), terminal):
            return


def _turn(chat: Conversation, line: str, terminal: bool) -> bool:
    """Do what a line says; False to leave."""
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        chat.reset()
        chat.note("[a new conversation]")
    elif command == "/system":
        chat.set_system(rest.strip())
        chat.note(
            "[system message set, a new conversation]" if rest.strip() else "[no system message, a new conversation]"
        )
    elif command.startswith("/") and command[1:].isalpha():
        chat.note(f"[{command} is no command: {HELP}]")
    else:
        if not terminal:
            chat.reset()
        _ask(chat, line, terminal)
    return True


def _ask(chat: Conversation, line: str, terminal: bool) -> None:
    try:
        chat.ask(line)
    except KeyboardInterrupt:
        chat.note("\n[stopped]")
    except DataError as error:
        if not terminal:
            raise
        chat.note(f"[{error}]")
