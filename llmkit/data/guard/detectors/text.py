"""Text as detectors read it: full-width forms narrow, dashes and spaces plain, invisible characters gone.

Positions are mapped back to the original, so that a finding always names the characters that the row really has.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\ufe58\ufe63"
_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff"


# Code points of the zeros of other scripts (Unicode category Nd); nine digits follow each.
_ZEROS = [
    int(code, 16)
    for code in "660 6f0 7c0 966 9e6 a66 ae6 b66 be6 c66 ce6 d66 de6 e50 ed0 f20 1040 1090 17e0 1810 1946 19d0 1a80 1a90"
    " 1b50 1bb0 1c40 1c50 a620 a8d0 a900 a9d0 a9f0 aa50 abf0 ff10 1d7ce 1d7d8 1d7e2 1d7ec 1d7f6".split()
]
_DIGITS = {zero + digit: str(digit) for zero in _ZEROS for digit in range(10)}
_NARROW: dict[int, str] = {
    **_DIGITS,
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    **dict.fromkeys(map(ord, _DASHES), "-"),
    **dict.fromkeys(map(ord, _SPACES), " "),
}
# Sentence marks of Chinese and Japanese are everywhere and separate nothing inside a value: no reason to translate.
_PLAIN_MARKS = "！，：；？"
_WIDE = "".join(re.escape(chr(code)) for code in _NARROW if chr(code) not in _PLAIN_MARKS)
_NEEDS_WORK = re.compile(f"[{_INVISIBLE}{_WIDE}]|[0-9][ー一－~〜][0-9]")
_HIDDEN = re.compile(f"[{_INVISIBLE}]+")
# The long vowel mark and the Chinese "one" stand for a dash between digits in hurried Japanese and Chinese typing.
_DASH_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])[ー一〜～](?=[0-9])")


class View(NamedTuple):
    """A normalized text; ``origin[i]`` is the place of its character ``i`` in the original (None: the same place)."""

    text: str
    origin: list[int] | None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Original start and end of ``text[start:end]``, which is not empty."""
        return (start, end) if self.origin is None else (self.origin[start], self.origin[end - 1] + 1)


def normalize(text: str) -> View:
    """``text`` for detectors. Costs one search for text that needs nothing, which is nearly all."""
    if text.isascii() or not _NEEDS_WORK.search(text):
        return View(text, None)
    origin = None
    if _HIDDEN.search(text):
        hidden = {at for run in _HIDDEN.finditer(text) for at in range(*run.span())}
        origin = [at for at in range(len(text)) if at not in hidden]
        text = _HIDDEN.sub("", text)
    text = text.translate(_NARROW)
    return View(_DASH_BETWEEN_DIGITS.sub("-", text), origin)
