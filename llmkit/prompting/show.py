"""A case token by token: what is learned, what is only read, and the special tokens that text editors hide.

::

    shown = views(template, subject, cases[:3])
    show_terminal(shown, Console())
    Path("cases.html").write_text(show_html(shown, "query-rewriting"), encoding="utf-8")
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmkit.data.render import IGNORED
from llmkit.prompting.few_shot import Demonstrations
from llmkit.prompting.report import Case, Subject
from llmkit.prompting.template import PromptTemplate
from llmkit.prompting.views import Bench, View, make_views

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PART = "·"
"""Stands for a token that holds only a part of a character; the character is shown at its first token."""


@dataclass(frozen=True)
class Token:
    """One token: ``text`` as it reads, ``learned`` whether the loss counts it, ``special`` whether it is a special token."""

    position: int
    id: int
    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One case in tokens. ``start`` is where the answer begins, the length of the prompt at inference."""

    case: str
    title: str
    tokens: list[Token] = field(default_factory=list)
    start: int = 0
    problem: str = ""
    known: bool = True

    @property
    def learned(self) -> int:
        return sum(token.learned for token in self.tokens)


def views(
    template: PromptTemplate | None,
    subject: Subject,
    cases: Sequence[Case],
    demonstrations: Demonstrations | None = None,
) -> list[Shown]:
    """Cases as training sees them; one whose answer is not known ends where inference begins.

    Raises DataError for a chat template or demonstrations that cannot be read.
    """
    bench = Bench(subject)
    title = f"{template.title if template else 'chat template'} · {subject.name}"
    return [_shown(view, bench, title) for view in make_views(template, bench, cases, demonstrations)]


def _shown(view: View, bench: Bench, title: str) -> Shown:
    ids, labels = view.ids, view.labels
    # prompt and answer of a sequence-to-sequence model are two sequences
    if bench.subject.seq2seq and view.prompt is not None:
        ids, labels = view.prompt + (labels or []), [IGNORED] * len(view.prompt) + (labels or [])
    if ids is None or labels is None or not view.known:
        ids, labels = view.prompt or [], [IGNORED] * len(view.prompt or [])
    problem = view.render_problem or view.prompt_problem or view.train_problem
    tokens = list(_tokens(ids, labels, bench))
    return Shown(view.case.id, title, tokens, len(view.prompt or []), problem, view.known)


def _tokens(ids: Sequence[int], labels: Sequence[int], bench: Bench) -> Iterator[Token]:
    special = set(bench.encoder.specials.values())
    texts = _texts(ids, special, bench)
    for position, (index, label, text) in enumerate(zip(ids, labels, texts, strict=True)):
        yield Token(position, index, text, label != IGNORED, index in special)


def _texts(ids: Sequence[int], special: set[int], bench: Bench) -> list[str]:
    """The text of each token, by decoding growing pieces, so that blanks and characters of several tokens come right."""
    texts: list[str] = []
    start = 0
    for at, index in enumerate(ids):
        if index in special:
            texts += [PART] * (at - len(texts))
            texts.append(bench.name(index))
            start = at + 1
            continue
        before = _decode(ids[start : len(texts)], bench)
        whole = _decode(ids[start : at + 1], bench)
        if whole.endswith(REPLACEMENT) and at - len(texts) < 4:
            continue  # a part of a character; the rest is to come
        texts.append(whole[len(before) :])
        texts += [PART] * (at + 1 - len(texts))
        if "\n" in texts[-1] or at - start > 64:
            start = _restart(ids, at, start, bench)
    return texts + [PART] * (len(ids) - len(texts))


def _restart(ids: Sequence[int], at: int, start: int, bench: Bench) -> int:
    """A later place to decode from, where the text reads the same from there; keeps long texts from taking squares."""
    keep = max(start, at - 2)
    return keep if _decode(ids[start : at + 1], bench).endswith(_decode(ids[keep : at + 1], bench)) else start


def _decode(ids: Sequence[int], bench: Bench) -> str:
    text = bench.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def visible_text(text: str) -> str:
    """Text in which control characters are letters: a row of data must not steer a terminal."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\\u{ord(character):04x}"
    return character


# ---- terminal ----

_LEARNED, _SPECIAL, _READ = "black on green", "bold magenta", "dim"
LEGEND = "⟦…⟧ is learned; the rest is only read; special tokens are written out; ↵ is a newline"


def show_terminal(shown: Iterable[Shown], console: Console) -> None:
    """Print cases with rich. Without colours ⟦ and ⟧ mark what is learned."""
    from rich.text import Text

    console.print(Text(LEGEND, style="dim"))
    for one in shown:
        console.rule(Text(f"{one.case} · {one.title}"), align="left")
        if one.problem:
            console.print(Text(visible_text(one.problem), style="red"))
        console.print(terminal_text(one), soft_wrap=True)
        console.print(Text(counts(one), style="dim"))


def terminal_text(one: Shown) -> Text:
    """One case as rich text."""
    from rich.text import Text

    text = Text()
    learned = False
    for token in one.tokens:
        if token.learned != learned:
            text.append("⟦" if token.learned else "⟧", style="bold green")
            learned = token.learned
        style = f"{_SPECIAL} reverse" if token.special and token.learned else _SPECIAL if token.special else ""
        text.append(visible_text(token.text), style=style or (_LEARNED if token.learned else _READ))
    if learned:
        text.append("⟧", style="bold green")
    return text


def counts(one: Shown) -> str:
    """How many tokens, in words."""
    if not one.tokens:
        return "no tokens"
    answer = f"{one.learned} learned" if one.known else "the right answer is not known"
    return f"{len(one.tokens)} tokens: {one.start} in the prompt, {answer}"


# ---- HTML ----

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.7 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
pre { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
section { border-top: 1px solid #8884; padding-top: .5rem; }
.t { border-radius: 2px; }
.t:nth-child(even) { background: #8881; }
.t:hover { outline: 1px solid #888; }
.l, .t.l:nth-child(even) { background: #2a92; box-shadow: inset 0 -2px #2a9; }
.s { color: #a3b; font-weight: 600; }
.n { opacity: .45; }
.problem { color: #c33; }
small { opacity: .7; }
@media (prefers-color-scheme: dark) { .s { color: #e8f; } .problem { color: #f77; } }
"""


def show_html(shown: Iterable[Shown], title: str) -> str:
    """A page of its own: every token with its id and position in a tooltip, what is learned on green."""
    name = html.escape(title)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>',
        f"<style>{_STYLE}</style>",
        f'<h1>{name}</h1><p><span class="l">learned</span> · <span class="s">special token</span> · '
        '<span class="n">↵</span> newline · point at a token for its id</p>',
    ]
    parts += [_section(one) for one in shown]
    return "\n".join([*parts, "</html>", ""])


def _section(one: Shown) -> str:
    problem = f'<p class="problem">{html.escape(one.problem)}</p>' if one.problem else ""
    tokens = "".join(_span(token) for token in one.tokens)
    head = f"<section><h2>{html.escape(one.case)} <small>{html.escape(one.title)}</small></h2>"
    return f"{head}{problem}<pre>{tokens}</pre><small>{counts(one)}</small></section>"


def _span(token: Token) -> str:
    kinds = " ".join(["t", *(["l"] if token.learned else []), *(["s"] if token.special else [])])
    text = html.escape(visible_text(token.text)).replace("↵", '<span class="n">↵</span>')
    what = "learned" if token.learned else "read"
    return f'<span class="{kinds}" title="{token.position + 1}: id {token.id}, {what}">{text}</span>'
