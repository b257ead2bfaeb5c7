"""The chat template in force, and the places in a rendered conversation where an assistant's turn begins and ends.

The places come from rendering prefixes of the conversation, so they are right for templates with and without
``{% generation %}``: the prompt of a turn is what the model is given at inference, and has to be the beginning of what
is rendered with the turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.data.rows import Message
from llmkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = Path(__file__).parent / "templates"


def template_text(given: str | None, tokenizer: Any) -> str | None:
    """The template: text, path of a file, name of a shipped one (chatml, dialogue), or the tokenizer's own.

    Raises DataError when ``given`` is none of these.
    """
    if given is None:
        own = getattr(tokenizer, "chat_template", None)
        return own.get("default") if isinstance(own, dict) else own
    if "{{" in given or "{%" in given:
        return given
    shipped = SHIPPED / f"{given}.jinja"
    path = shipped if "/" not in given and shipped.is_file() else Path(given).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.jinja")))
        raise DataError(
            f"data.chat_template: {given} cannot be read as a template file ({error}). "
            f"Give the template's text, a .jinja file, or one of: {names}."
        ) from None


class NotAPrefixError(ValueError):
    """The prompt of a turn is not the beginning of the rendering that includes the turn."""

    def __init__(self, turn: int, shorter: str, longer: str, what: str) -> None:
        super().__init__(what)
        self.turn, self.shorter, self.longer, self.what = turn, shorter, longer, what


@dataclass(frozen=True, slots=True)
class Turn:
    """Where an assistant's turn lies in the rendered text: ``[start, stop)``; message number ``index``."""

    index: int
    start: int
    stop: int


class ChatTemplate:
    """Renders conversations with one template, always the same way, for training and for inference."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
        self.text = text
        self._tokenizer: Any = tokenizer
        self._system = system

    def with_system(self, messages: list[Message], system: str | None = None) -> list[Message]:
        """Put the system message before a conversation that has none."""
        system = system or self._system
        if system and not any(message["role"] in ("system", "developer") for message in messages):
            return [{"role": "system", "content": system}, *messages]
        return messages

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        """Text of the conversation. Raises ValueError with the template's own words when it refuses."""
        import jinja2

        try:
            return self._render(messages, tools, prompt)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            if isinstance(error, jinja2.TemplateSyntaxError):
                raise DataError(f"data.chat_template: line {error.lineno}: {error.message}") from None
            raise ValueError(f"the chat template refuses it: {error}") from None

    @cached_property
    def _render(self) -> Callable[[list[Message], list[dict[str, Any]] | None, bool], str]:
        """``apply_chat_template`` without what it does anew for every conversation, where transformers allows it.

        The compiled template is transformers' own. Jinja copies all its globals for every rendering; here they are
        merged once.
        """
        tokenizer, text = self._tokenizer, self.text
        compiled = _compiled(text)
        if compiled is None:
            return lambda messages, tools, prompt: str(
                tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=text, tokenize=False, add_generation_prompt=prompt
                )
            )
        shared = {**compiled.globals, **tokenizer.special_tokens_map, "documents": None}

        def render(messages: list[Message], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
            variables = shared | {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
            return "".join(compiled.root_render_func(compiled.new_context(variables, shared=True)))

        return render

    def turns(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, last_only: bool
    ) -> tuple[str, list[Turn]]:
        """The text up to the last assistant turn's end, and its assistant turns (or the last one only).

        Raises NotAPrefixError, or ValueError when the template refuses the conversation.
        """
        indexes = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        text = self.render(messages[: indexes[-1] + 1], tools, prompt=False)
        turns = []
        for index in indexes[-1:] if last_only else indexes:
            prompt = self.render(messages[:index], tools, prompt=True) if index else ""
            until = text if index == indexes[-1] else self.render(messages[: index + 1], tools, prompt=False)
            if not until.startswith(prompt):
                raise NotAPrefixError(index, prompt, until, "the prompt given at inference")
            if not text.startswith(until):
                raise NotAPrefixError(index, until, text, "the conversation up to the turn")
            turns.append(Turn(index, len(prompt), len(until)))
        return text, turns


def _compiled(text: str) -> Any:
    """The template as transformers compiles it; None where it has no such function (any more)."""
    from transformers.utils import chat_template_utils

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    return None if compile_template is None else compile_template(text)
