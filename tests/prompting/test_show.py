"""Pictures of a case: what is learned, special tokens, and text that must not steer a terminal or a browser."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from llmkit.prompting.report import Case, Subject
from llmkit.prompting.show import PART, show_html, show_terminal, terminal_text, views
from llmkit.prompting.static import open_subject

TALK = [
    {"role": "user", "content": "이 신발 🥿 방수?\n中文 \x1b[31m\u202e <b>&</b>"},
    {"role": "assistant", "content": "네, 방수입니다. 👍🏽"},
]


@pytest.fixture(scope="module")
def subject(tiny_llama: Path) -> Subject:
    return open_subject(str(tiny_llama), name="tiny")


def test_every_character_is_shown_once_at_its_first_token(subject: Subject) -> None:
    (shown,) = views(None, subject, [Case("a", messages=TALK)])
    text = "".join(token.text for token in shown.tokens if token.text != PART)
    assert text == (
        f"<|im_start|>user\n{TALK[0]['content']}<|im_end|>\n<|im_start|>assistant\n{TALK[1]['content']}<|im_end|>\n"
    )
    assert shown.tokens[0].special
    learned = "".join(token.text for token in shown.tokens if token.learned and token.text != PART)
    assert learned == TALK[1]["content"] + "<|im_end|>"
    assert [token.learned for token in shown.tokens].index(True) == shown.start


def test_the_terminal_shows_marks_and_is_not_steered(subject: Subject) -> None:
    out = StringIO()
    show_terminal(
        views(None, subject, [Case("a", messages=TALK), Case("b", messages=TALK[:1])]), Console(file=out, width=300)
    )
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u001b[31m" in text
    assert text.count("⟦") == 2, "once in the legend, once in the case whose answer is known"
    assert "the right answer is not known" in text


def test_html_escapes_everything(subject: Subject) -> None:
    page = show_html(views(None, subject, [Case("<script>", messages=TALK)]), "a & b")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>" not in page
    assert "a &amp; b" in page
    assert page.count('class="t l') == sum(
        t.learned for t in views(None, subject, [Case("a", messages=TALK)])[0].tokens
    )


def test_a_case_that_cannot_be_rendered_says_why(subject: Subject) -> None:
    (shown,) = views(None, subject, [Case("a")])
    assert "no messages" in shown.problem
    assert not terminal_text(shown).plain


def test_long_texts_take_linear_time(subject: Subject) -> None:
    """A thousand lines and a line of ten thousand letters are decoded in pieces."""
    text = "\n".join(f"line {n} 한국어" for n in range(300)) + "x" * 5_000
    (shown,) = views(None, subject, [Case("a", messages=[{"role": "user", "content": text}])])
    assert text in "".join(token.text for token in shown.tokens if token.text != PART)
