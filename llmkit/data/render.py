"""One renderer turns a row into tokens, for training and for inference alike.

A conversation is rendered once and cut where assistant turns begin and end; each piece is encoded on its own, so that
the tokens before an answer are exactly the tokens that inference starts from. What is learned of a turn ends with a
stop token; blanks after it are in the input and not learned. Labels are never masked by token id.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmkit.data.encoder import PieceEncoder
from llmkit.data.formats import shorten
from llmkit.data.rows import BadRow, Conversation, Encoded, Message, PromptCompletion, Sample, Text
from llmkit.data.templates import ChatTemplate, NotAPrefixError, Turn, template_text
from llmkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_INNER, _START = 0, 1
_AT_ONCE = 500
_Texts = tuple[dict[str, list[int]], dict[str, list[int]]]


@dataclass(slots=True)
class _Draft:
    """A row cut into parts ``(token id, text, mode, learned)``; text still to be encoded has the id -1.

    ``seams`` are texts across the start of an earlier turn, with the two parts that they were cut into.
    """

    row_id: str
    parts: list[tuple[int, str, int, bool]] = field(default_factory=list)
    seams: list[tuple[tuple[str, int], str]] = field(default_factory=list)
    target: list[tuple[int, str, int, bool]] | None = None
    splittable: bool = False


class Renderer:
    """Turns rows into tokens and labels, and messages into the prompt that the model was trained on.

    ``stop_ids`` are the tokens that end an answer: those given (else the tokenizer's eos), and the one that the
    template ends a turn with, which has to be written into the model's generation config. ``notes`` says what was
    decided. Raises DataError for a chat template that cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        system: str | None = None,
        supervise: Literal["all", "last"] = "all",
        seq2seq: bool = False,
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._encoder = PieceEncoder(tokenizer)
        self.supervise = supervise
        self.seq2seq = seq2seq
        self.system = system
        self.notes: list[str] = []
        eos = self._tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = tuple(stop_ids) if stop_ids else () if eos is None else (int(eos),)
        self._given_stop_ids = self.stop_ids
        self.chat_template = template_text(chat_template, tokenizer)
        self._chat = ChatTemplate(self.chat_template, tokenizer, system) if self.chat_template else None
        if self._chat and not seq2seq:
            self._probe(self._chat)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that decides which tokens and labels a row gets."""
        rule = [self.chat_template, self.system, self.supervise, self.seq2seq, sorted(self._given_stop_ids)]
        digest = hashlib.sha256(json.dumps(rule).encode())
        for part in self._encoder.identity():
            digest.update(part.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _probe(self, chat: ChatTemplate) -> None:
        """Learn from a made-up conversation what ends a turn, so that inference knows it before any row is read.

        A template that this conversation does not suit may suit the rows, and each row is checked again.
        """
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text, turns = chat.turns(chat.with_system(talk), None, last_only=True)
        except ValueError:
            return
        with contextlib.suppress(DataError):
            self._turn_end(text[turns[0].start :])

    # ---- inference ----

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation that the assistant is to continue: exactly the tokens that training put before it.

        Raises DataError without a chat template or when the template refuses the messages.
        """
        if self._chat is None:
            raise DataError(_no_template("chat needs one"))
        messages = self._chat.with_system(list(messages))
        shield = _Shield(self._encoder, messages, tools)
        try:
            text = self._chat.render(shield.messages, shield.tools, prompt=True)
            turns = self._earlier_turns(shield.messages, shield.tools, text)
        except ValueError as error:
            raise DataError(str(error)) from None
        draft = _Draft("the messages")
        self._cut(draft, text, turns, shield, skip=set(range(len(messages))))
        if self.seq2seq:
            draft.parts = self._source_parts(draft.parts)
        return self._finish_one(draft)

    def completion_prompt(self, text: str) -> list[int]:
        """Ids of a plain text that the model is to continue, with the bos that training put before it, no template."""
        draft = _Draft("the prompt", [(-1, text, _START, False)])
        if self.seq2seq:
            draft.parts = self._source_parts(draft.parts)
        else:
            draft.parts = self._bos() + draft.parts
        return self._finish_one(draft)

    def _finish_one(self, draft: _Draft) -> list[int]:
        encoded = self._assemble(draft, self._texts([draft]))
        return [int(index) for index in encoded.input_ids]

    def _earlier_turns(self, messages: list[Message], tools: list[dict[str, Any]] | None, text: str) -> list[Turn]:
        if self._chat is None or self.supervise == "last" or self.seq2seq:
            return []
        if not any(message["role"] == "assistant" for message in messages):
            return []
        try:
            before, turns = self._chat.turns(messages, tools, last_only=False)
        except NotAPrefixError:
            return []  # such a template cannot be trained with supervise: all, so there are no tokens to be equal to
        return turns if text.startswith(before) else []

    # ---- training ----

    def encode(self, rows: Sequence[Sample]) -> list[Encoded | BadRow]:
        """Tokens and labels of rows, in order; a row that the template refuses is a BadRow.

        Raises DataError for what no single row is to blame for: no chat template, a template whose prompts are not
        prefixes, turns that end without a stop token, no eos. Give some thousand rows at a time.
        """
        parts = [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]
        if len(parts) < 2:
            drafts = [self._draft(row) for row in rows]
            return self._fill(drafts, self._texts(drafts))
        # the tokenizer, which needs no Python lock, works on one part while the next one is rendered
        done: list[Encoded | BadRow] = []
        with ThreadPoolExecutor(1) as pool:
            before: tuple[list[_Draft | BadRow], Future[_Texts]] | None = None
            for part in parts:
                drafts = [self._draft(row) for row in part]
                now = (drafts, pool.submit(self._texts, drafts))
                done += self._fill(before[0], before[1].result()) if before else []
                before = now
            done += self._fill(before[0], before[1].result()) if before else []
        return done

    def _fill(self, drafts: list[_Draft | BadRow], texts: _Texts) -> list[Encoded | BadRow]:
        return [draft if isinstance(draft, BadRow) else self._assemble(draft, texts) for draft in drafts]

    def _draft(self, row: Sample) -> _Draft | BadRow:
        if isinstance(row, Text):
            return self._draft_text(row)
        if isinstance(row, PromptCompletion):
            if self._chat is None:
                return self._draft_plain(row)
            talk = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
            row = Conversation(self._chat.with_system(talk, row.system), None, 0, row.row_id)
        try:
            return self._draft_source_target(row) if self.seq2seq else self._draft_chat(row)
        except NotAPrefixError as error:
            raise DataError(self._prefix_message(row, error)) from None
        except ValueError as error:
            return BadRow(row.row_id, shorten(str(error)))

    def _draft_text(self, row: Text) -> _Draft:
        if self.seq2seq:
            raise DataError("data.format: text trains causal models only; a sequence-to-sequence model needs pairs.")
        parts = [(index, text, mode, True) for index, text, mode, _ in self._bos()]
        parts += [(-1, row.text, _START, True), (self._eos(), "", _INNER, True)]
        return _Draft(row.row_id, parts, splittable=True)

    def _draft_plain(self, row: PromptCompletion) -> _Draft:
        prompt = f"{row.system}\n\n{row.prompt}" if row.system or self.system else row.prompt
        if row.system is None and self.system:
            prompt = f"{self.system}\n\n{row.prompt}"
        if self.seq2seq:
            return _Draft(row.row_id, self._source_parts([(-1, prompt, _START, False)]), target=self._target(row))
        parts = [*self._bos(), (-1, prompt, _START, False)]
        parts += [(-1, row.completion, _INNER, True), (self._eos(), "", _INNER, True)]
        return _Draft(row.row_id, parts)

    def _draft_chat(self, row: Conversation) -> _Draft:
        if self._chat is None:
            raise DataError(f"{row.row_id}: {_no_template('conversations need one')}")
        messages = self._chat.with_system(row.messages)
        skip = set(range(row.learn_from + len(messages) - len(row.messages)))
        skip |= {index for index, message in enumerate(messages) if message.get("weight") == 0}
        shield = _Shield(self._encoder, messages, row.tools)
        text, turns = self._chat.turns(shield.messages, shield.tools, last_only=self.supervise == "last")
        draft = _Draft(row.row_id)
        self._cut(draft, text, turns, shield, skip)
        return draft

    def _draft_source_target(self, row: Conversation) -> _Draft:
        last = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
        before, answer = row.messages[:last], row.messages[last]["content"]
        if not answer.strip():
            raise ValueError("the last assistant turn has no text")
        if self._chat is None:
            source = "\n".join(message["content"] for message in before)
            draft = _Draft(row.row_id, [(-1, source, _START, False)])
        else:
            shield = _Shield(self._encoder, self._chat.with_system(before), row.tools)
            draft = _Draft(row.row_id)
            self._cut(draft, self._chat.render(shield.messages, shield.tools, prompt=True), [], shield, set())
        draft.parts = self._source_parts(draft.parts)
        draft.target = self._target(PromptCompletion("", answer))
        return draft

    def _cut(self, draft: _Draft, text: str, turns: list[Turn], shield: _Shield, skip: set[int]) -> None:
        """Cut a rendered text into parts at special tokens and at the turns; learn each turn up to its stop token."""
        at = 0
        for number, turn in enumerate(turns):
            self._add(draft, text[at : turn.start], shield, learned=False)
            body = text[turn.start : turn.stop]
            pieces, tail = self._turn_end(body)
            opening = draft.parts[-1] if draft.parts else None
            learned = turn.index not in skip
            for index, piece in pieces:
                self._part(draft, index, shield.restore(piece), learned)
            at = turn.stop - len(tail)
            later = number + 1 < len(turns) or turn.stop < len(text)
            if later and opening is not None and opening[0] < 0 and pieces[0][0] < 0:
                draft.seams.append(((opening[1], opening[2]), shield.restore(pieces[0][1])))
        self._add(draft, text[at:], shield, learned=False)

    def _add(self, draft: _Draft, text: str, shield: _Shield, learned: bool) -> None:
        for index, piece in self._encoder.split(text):
            self._part(draft, index, shield.restore(piece), learned)

    def _part(self, draft: _Draft, index: int, text: str, learned: bool) -> None:
        if not draft.parts:
            mode = _START
        elif draft.parts[-1][0] >= 0:
            mode = _INNER if self._encoder.inner_after_special else _START
        else:
            mode = _INNER
        draft.parts.append((index, text, mode, learned))

    def _turn_end(self, body: str) -> tuple[list[tuple[int, str]], str]:
        """Pieces of an assistant's turn up to its stop token, and the blanks after it. Raises DataError without one."""
        pieces = self._encoder.split(body)
        ends = [number for number, piece in enumerate(pieces) if piece[0] >= 0]
        tail = "".join(text for _, text in pieces[ends[-1] + 1 :]) if ends else body
        if not ends or tail.strip():
            raise DataError(
                f"the chat template ends an assistant's turn with {body[-24:]!r}, which is no special token of this "
                "tokenizer: a model trained on it never stops. Use a template that ends a turn with "
                f"{self._tokenizer.eos_token or 'an eos token'!r} (data.chat_template: dialogue does)."
            )
        stop = pieces[ends[-1]][0]
        if stop not in self.stop_ids:
            self.stop_ids += (stop,)
            name = self._tokenizer.convert_ids_to_tokens(stop)
            self.notes.append(f"{name} ends an assistant's turn in the chat template: added to the stop tokens")
        return pieces[: ends[-1] + 1], tail

    def _bos(self) -> list[tuple[int, str, int, bool]]:
        return [(index, "", _INNER, False) for index in self._encoder.around[0]]

    def _eos(self) -> int:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise DataError("the tokenizer has no eos token: a model trained without one never stops.")
        return int(eos)

    def _source_parts(self, parts: list[tuple[int, str, int, bool]]) -> list[tuple[int, str, int, bool]]:
        before, after = self._encoder.around
        head = [(index, "", _INNER, False) for index in before]
        return head + parts + [(index, "", _INNER, False) for index in after]

    def _target(self, row: PromptCompletion) -> list[tuple[int, str, int, bool]]:
        return [(-1, row.completion, _START, True), (self._eos(), "", _INNER, True)]

    def _texts(self, drafts: Sequence[_Draft | BadRow]) -> _Texts:
        """Ids of all different texts of these drafts, encoded in two calls: middles of texts, and beginnings."""
        texts: _Texts = ({}, {})
        inner = _START if self._encoder.seamless else _INNER
        for draft in drafts:
            if isinstance(draft, BadRow):
                continue
            for index, text, mode, _ in draft.parts + (draft.target or []):
                if index < 0:
                    texts[mode | inner][text] = []
            for (head, mode), tail in draft.seams:
                texts[mode | inner][head + tail] = []
        encoders = (self._encoder.encode_inner, self._encoder.encode)
        for table, encode in zip(texts, encoders, strict=True):
            table.update(zip(table, encode(list(table)), strict=True))
        return texts

    def _assemble(self, draft: _Draft, texts: _Texts) -> Encoded:
        inner = _START if self._encoder.seamless else _INNER
        ids, labels = _join(draft.parts, texts, inner)
        if draft.target is not None:
            labels = _join(draft.target, texts, inner)[1]
        drift = any(
            texts[mode | inner][head + tail] != texts[mode | inner][head] + texts[_INNER | inner][tail]
            for (head, mode), tail in draft.seams
        )
        return Encoded(
            draft.row_id,
            np.array(ids, dtype=np.int32),
            np.array(labels, dtype=np.int32),
            draft.splittable,
            drift,
        )

    def _prefix_message(self, row: Conversation, error: NotAPrefixError) -> str:
        at = next(
            (n for n, (a, b) in enumerate(zip(error.shorter, error.longer, strict=False)) if a != b),
            min(len(error.shorter), len(error.longer)),
        )
        ids = [self._finish_one(self._plain_draft(text)) for text in (error.shorter, error.longer)]
        token = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        names = [
            repr(self._tokenizer.convert_ids_to_tokens(side[token])) if token < len(side) else "its end" for side in ids
        ]
        last = "" if self.supervise == "last" else (
            " Templates that drop thinking from earlier turns are like this: set data.supervise: last."
        )  # fmt: skip
        return (
            f"{row.row_id}: the chat template does not keep prefixes, so what is learned of turn {error.turn + 1} would "
            f"differ from what inference sees. {error.what[0].upper()}{error.what[1:]} and the rendering that includes "
            f"more differ first at token {token + 1}: {names[0]} against {names[1]}.\n"
            f"  shorter: …{error.shorter[max(0, at - 40) : at + 40]!r}\n"
            f"  longer:  …{error.longer[max(0, at - 40) : at + 40]!r}\n"
            f" {last or ' Use another data.chat_template.'}"
        )

    def _plain_draft(self, text: str) -> _Draft:
        draft = _Draft("")
        self._add(draft, text, _Shield(self._encoder, [], None), learned=False)
        return draft


def _join(parts: list[tuple[int, str, int, bool]], texts: _Texts, inner: int) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for index, text, mode, learned in parts:
        piece = texts[mode | inner][text] if index < 0 else [index]
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    return ids, labels


def _no_template(why: str) -> str:
    return (
        f"the tokenizer has no chat template, and {why}. Set data.chat_template: chatml (for tokenizers that know "
        "<|im_start|> and <|im_end|>), dialogue (for any), or a .jinja file."
    )


class _Shield:
    """Breaks the special tokens that people wrote into messages, so that no template or tokenizer takes them for real.

    A character that occurs nowhere in the messages is put after the first letter of each; ``restore`` takes it out of
    the rendered text again. Messages without such tokens pass unchanged.
    """

    def __init__(self, encoder: PieceEncoder, messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
        self._literal = encoder.literal
        self._mark = ""
        self.messages, self.tools = messages, tools
        if self._found(messages, tools):
            everything = json.dumps([messages, tools], ensure_ascii=False)
            self._mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in everything)
            self.messages = [self._broken(message, top=True) for message in messages]
            self.tools = self._broken(tools) if tools else tools

    def _found(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> bool:
        if self._literal is None:
            return False
        search = self._literal.search
        for message in messages:
            if search(message["content"] or ""):
                return True
            if len(message) > 2 and search(json.dumps(message, ensure_ascii=False)):
                return True
        return bool(tools) and search(json.dumps(tools, ensure_ascii=False)) is not None

    def _broken(self, value: Any, top: bool = False) -> Any:
        if isinstance(value, str):
            mark, literal = self._mark, self._literal
            return literal.sub(lambda m: m.group()[0] + mark + m.group()[1:], value) if literal is not None else value
        if isinstance(value, dict):
            return {
                (key if top else self._broken(key)): (item if top and key == "role" else self._broken(item))
                for key, item in value.items()
            }
        return [self._broken(item) for item in value] if isinstance(value, list) else value

    def restore(self, text: str) -> str:
        return text.replace(self._mark, "") if self._mark else text
