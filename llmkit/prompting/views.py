"""A case as the model meets it: the prompt that inference gives it, and the tokens and labels that training does.

The checks and the pictures of a case are made from these views, so that what is shown is what was checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmkit.data.encoder import PieceEncoder
from llmkit.data.formats import ROLES
from llmkit.data.render import IGNORED, Renderer
from llmkit.data.rows import BadRow, Conversation, Encoded, Message, PromptCompletion, Sample
from llmkit.data.templates import ChatTemplate
from llmkit.errors import DataError
from llmkit.prompting.few_shot import Demonstrations
from llmkit.prompting.report import Case, Subject
from llmkit.prompting.template import PromptTemplate

PLACEHOLDER = "An answer."
"""Stands for the answer of a case that has none, so that its training text can be looked at."""
_THINKING = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL)


class Bench:
    """A subject opened for tests. Raises DataError for a chat template that cannot be read."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.tokenizer: Any = subject.tokenizer
        self.encoder = PieceEncoder(subject.tokenizer)
        self.renderer = self._make_renderer(subject.supervise)
        self._last_only: Renderer | None = None
        text = self.renderer.chat_template
        self.chat = ChatTemplate(text, subject.tokenizer, subject.system) if text else None

    def _make_renderer(self, supervise: Literal["all", "last"]) -> Renderer:
        subject = self.subject
        return Renderer(
            subject.tokenizer,
            chat_template=subject.chat_template,
            system=subject.system,
            supervise=supervise,
            seq2seq=subject.seq2seq,
            stop_ids=subject.stop_ids,
        )

    def renderer_of(self, view: View) -> Renderer:
        """The renderer of a conversation: one of which only the last answer is learned needs no prefixes before it."""
        if self.subject.supervise == "last" or view.turns != (view.last,):
            return self.renderer
        if self._last_only is None:
            self._last_only = self._make_renderer("last")
        return self._last_only

    @property
    def model_stops(self) -> tuple[int, ...]:
        """Where the model as it is stops: its generation config, else the tokenizer's eos."""
        if self.subject.stop_ids:
            return self.subject.stop_ids
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (int(eos),)

    def added(self) -> dict[str, int]:
        """Every added token, special or not, by its text."""
        tokens = {token.content: int(index) for index, token in self.tokenizer.added_tokens_decoder.items()}
        return tokens | self.encoder.specials

    def name(self, index: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(int(index)))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def plain_ids(self, text: str) -> list[int]:
        """What a server makes of a rendered text: special tokens are parsed, none are added."""
        return [int(index) for index in self.tokenizer.encode(text, add_special_tokens=False)]


@dataclass
class View:
    """One case. ``prompt`` are the ids at inference, ``ids`` and ``labels`` those of training; None with a ``problem``.

    ``messages`` are all of the conversation, answer included, and ``turns`` the indexes of those that are learned.
    ``known`` says that the answer is the case's own and no placeholder.
    """

    case: Case
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    answer: str | None = None
    turns: tuple[int, ...] = ()
    known: bool = False
    prompt: list[int] | None = None
    ids: list[int] | None = None
    labels: list[int] | None = None
    own_ids: list[int] | None = None
    own_labels: list[int] | None = None
    """What llmkit's own training makes of it; the same as ``ids`` unless the subject brings another pipeline."""
    drift: bool = False
    prompt_problem: str = ""
    train_problem: str = ""
    render_problem: str = ""

    @property
    def last(self) -> int:
        """Index of the answer."""
        return len(self.messages) - 1

    @property
    def answer_tokens(self) -> int:
        """Tokens of the last answer, with its stop token; 0 when it is not known."""
        if not self.known or self.labels is None:
            return 0
        start, stop = (segments(self.labels) or [(0, 0)])[-1]
        return stop - start

    @property
    def length(self) -> int:
        """Tokens of the row; of the prompt alone when no answer is known or no training text can be made."""
        prompt = len(self.prompt or [])
        if not self.known or self.ids is None:
            return prompt
        return max(prompt, len(self.ids))


def make_views(
    template: PromptTemplate | None,
    bench: Bench,
    cases: Iterable[Case],
    demonstrations: Demonstrations | None = None,
) -> list[View]:
    """Views of the cases, in order; what goes wrong with one is said in it.

    ``demonstrations`` chooses a template's examples; None takes what the template itself says.
    """
    cases = list(cases)
    if template is not None and demonstrations is None:
        demonstrations = template.demonstrations()
    shown = demonstrations.pick_all([case.values for case in cases]) if demonstrations else [[] for _ in cases]
    return [_view(template, bench, case, examples) for case, examples in zip(cases, shown, strict=True)]


def _view(template: PromptTemplate | None, bench: Bench, case: Case, examples: Sequence[Mapping[str, Any]]) -> View:
    try:
        made, learn_from = _contents(template, case, examples)
    except DataError as error:
        return View(case, render_problem=str(error))
    if made.text is not None:
        return _complete_text(made, bench)
    return _complete_chat(made, bench, learn_from)


def _contents(template: PromptTemplate | None, case: Case, examples: Sequence[Mapping[str, Any]]) -> tuple[View, int]:
    """Messages or text of a case, with its answer; and the first message that may be learned."""
    if template is None:
        messages = _checked(case.messages)
        if messages[-1]["role"] == "assistant":
            return View(case, messages, case.tools, known=True, answer=messages[-1]["content"]), 0
        known = case.answer is not None
        messages.append({"role": "assistant", "content": case.answer or PLACEHOLDER})
        return View(case, messages, case.tools, known=known, answer=case.answer), 0
    answer = case.answer if case.answer is not None else template.answer(case.values)
    prompt = template.render(case.values, examples)
    view = View(case, tools=case.tools, answer=answer, known=answer is not None)
    if isinstance(prompt, str):
        view.text = prompt
        return view, 0
    view.messages = [*prompt, {"role": "assistant", "content": answer or PLACEHOLDER}]
    return view, len(prompt)


def _checked(messages: Sequence[Mapping[str, Any]] | None) -> list[Message]:
    """Messages of a case, in the form that the readers of data give them. Raises DataError for others."""
    if not messages:
        raise DataError("the case has no messages, and there is no template to make them from its values")
    made = []
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        if message.get("role") not in ROLES:
            raise DataError(f"message {number} has the role {message.get('role')!r}; known: {', '.join(ROLES)}")
        if content is not None and not isinstance(content, str):
            raise DataError(f"the content of message {number} is {type(content).__name__}; only text is checked")
        made.append(dict(message) | {"content": content or ""})
    return made


def _complete_text(view: View, bench: Bench) -> View:
    text, answer = view.text or "", view.answer or PLACEHOLDER
    try:
        view.prompt = bench.renderer.completion_prompt(text)
    except DataError as error:
        view.prompt_problem = str(error)
    # a tokenizer with a chat template is trained on chats: of a bare text there is no training text to compare with
    if bench.chat is None:
        _train(view, bench, PromptCompletion(text, answer, row_id=view.case.id), None)
    return view


def _complete_chat(view: View, bench: Bench, learn_from: int) -> View:
    if bench.chat is not None:
        given = len(view.messages)
        view.messages = bench.chat.with_system(view.messages)
        learn_from += len(view.messages) - given if learn_from else 0
    learned = [
        index
        for index, message in enumerate(view.messages)
        if message["role"] == "assistant" and index >= learn_from and message.get("weight", 1)
    ]
    view.turns = tuple(learned[-1:] if bench.subject.supervise == "last" else learned)
    try:
        view.prompt = bench.renderer_of(view).prompt(view.messages[:-1], view.tools)
    except DataError as error:
        view.prompt_problem = str(error)
    row = Conversation(view.messages, view.tools, learn_from, view.case.id)
    _train(view, bench, row, row)
    return view


def _train(view: View, bench: Bench, row: Sample, conversation: Conversation | None) -> None:
    try:
        made = bench.renderer_of(view).encode([row])[0]
    except DataError as error:
        view.train_problem = str(error)
    else:
        if isinstance(made, BadRow):
            view.train_problem = made.reason
        else:
            view.own_ids, view.own_labels = _lists(made)
            view.drift = made.drift
    if bench.subject.train is None or conversation is None:
        view.ids, view.labels = view.own_ids, view.own_labels
        return
    try:
        ids, labels = bench.subject.train(conversation)
    except (ValueError, TypeError, KeyError, LookupError) as error:
        view.train_problem = view.train_problem or f"the training pipeline refuses it: {error}"
        return
    view.ids, view.labels = [int(i) for i in ids], [int(i) for i in labels]


def _lists(made: Encoded) -> tuple[list[int], list[int]]:
    return [int(i) for i in made.input_ids], [int(i) for i in made.labels]


def segments(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of what is learned, as ``[start, stop)``."""
    return list(_runs(label != IGNORED for label in labels))


def _runs(flags: Iterable[bool]) -> Iterator[tuple[int, int]]:
    start, at = -1, -1
    for at, flag in enumerate(flags):
        if flag and start < 0:
            start = at
        elif not flag and start >= 0:
            yield start, at
            start = -1
    if start >= 0:
        yield start, at + 1


def thinking_of(message: Message) -> str:
    """What a message thinks before it answers: ``reasoning_content``, or the text between thinking tags."""
    if message.get("reasoning_content"):
        return str(message["reasoning_content"]).strip()
    found = _THINKING.search(message["content"] or "")
    return found.group(1).strip() if found else ""


def visible(message: Message) -> str:
    """What a message says, without its thinking."""
    return _THINKING.sub("", message["content"] or "").strip()
