"""Rows that are probably no good examples: checks of one row, and of a row among all the others."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmkit.data.guard.encoding import damage
from llmkit.data.guard.settings import Check
from llmkit.data.guard.view import View

_EMPTY = re.compile(r"(?i)^[\W_]*(?:n/?a|null|nan|nil|todo|tbd|undefined|\[?empty\]?|暂无)?[\W_]*$")
_ARITHMETIC = re.compile(r"[+*=<>%^√∞]")
_START = 200
# Refusals and self-descriptions as assistants write them, at the beginning of an answer.
_BOILERPLATE = re.compile(
    r"(?i)\bas an ai\b|\bas a (?:large )?language model\b|\bi(?:'| a)m (?:just )?an ai\b"
    r"|\bi(?:'| a)m sorry,? but (?:i|as)\b|\bi apologi[sz]e,? but\b"
    r"|\bi (?:can(?:'|no)t|am (?:not able|unable) to) (?:assist|help|fulfil|provide|comply|answer)"
    r"|\bmy knowledge cut-?off\b|\bi do(?:n't| not) have (?:personal|feelings|access to real)"
    r"|(?:저는|제가) (?:인공지능|AI|언어 ?모델)|(?:AI|인공지능) 언어 ?모델로서|죄송(?:합니다|하지만)[,.]? ?(?:만 )?(?:저는|제가|그|이|해당|도와)"
    r"|作为(?:一个|一名)?(?:人工智能|AI|大?语言模型)|我是(?:一个|一名)?(?:人工智能|AI|大?语言模型)|(?:抱歉|对不起)[,，]?我(?:不能|无法|不会|没有)"
    r"|(?:私は|わたしは)(?:AI|人工知能|言語モデル)|申し訳(?:ありません|ございません)が"
)
# One of these is in whatever the pattern finds: most answers need no more than to look for them.
_HINTS = (
    "ai", "language model", "sorry", "apolog", "i can", "i am", "cutoff", "cut-off", "i do",
    "인공지능", "언어", "죄송", "人工智能", "语言模型", "抱歉", "对不起", "人工知能", "言語モデル", "申し訳",
)  # fmt: skip
_CURLY = str.maketrans({"’": "'", "‘": "'", "＇": "'"})
_LONG_ENOUGH = 300
_SAME_AGAIN = 0.12
"""Compressed share of an answer's bytes below which it repeats itself: prose has 0.35 to 0.6, lists and tables 0.2."""
REASONS: dict[Check, str] = {
    "empty": "the answer says nothing",
    "boilerplate": "the answer is a refusal or speaks as an AI",
    "repetition": "the answer repeats itself",
    "encoding": "damaged text",
    "language": "another language than the data's",
    "length": "far shorter or longer than the rest",
}
"""What each check finds, in words."""


def row_faults(row: View, checks: Sequence[Check]) -> dict[Check, str]:
    """Checks of one row that name it, with the reason: ``empty``, ``boilerplate``, ``repetition``, ``encoding``."""
    found: dict[Check, str] = {}
    if "empty" in checks and any(map(_is_empty, row.answers)):
        found["empty"] = REASONS["empty"]
    # a document may speak about anything; an answer should not
    if "boilerplate" in checks and row.question and any(map(_is_boilerplate, row.answers)):
        found["boilerplate"] = REASONS["boilerplate"]
    if "repetition" in checks and any(map(_repeats, row.answers)):
        found["repetition"] = REASONS["repetition"]
    if "encoding" in checks:
        wrong = damage(row.question) or next(filter(None, map(damage, row.answers)), "")
        if wrong:
            found["encoding"] = f"{REASONS['encoding']}: {wrong}"
    return found


def _is_empty(answer: str) -> bool:
    """No letter or digit in it (emoji and formulas are answers), or a word that stands for nothing."""
    if len(answer) > 40 or not _EMPTY.match(answer):
        return False
    return not _ARITHMETIC.search(answer) and all(ord(c) < 0x2600 or c.isalnum() for c in answer)


def _is_boilerplate(answer: str) -> bool:
    start = answer[:_START].lower()
    return any(map(start.__contains__, _HINTS)) and _BOILERPLATE.search(start.translate(_CURLY)) is not None


def _repeats(answer: str) -> bool:
    if len(answer) < _LONG_ENOUGH:
        return False
    raw = answer.encode("utf-8", "surrogatepass")[:20_000]
    return len(zlib.compress(raw, 1)) < _SAME_AGAIN * len(raw)


_FENCE = 3.0
_FEWEST = 50


def length_limits(lengths: NDArray[np.int64]) -> tuple[float, float]:
    """Tukey's outer fences of the logarithm of the lengths, in characters: what lies outside is far off.

    At least a factor of four to either side of the quartiles is left, so that even lengths do not make every row an
    outlier. No limits below 50 rows.
    """
    known = np.log(lengths[lengths > 0])
    if len(known) < _FEWEST:
        return 0.0, float("inf")
    low, high = np.percentile(known, [25, 75])
    reach = max(_FENCE * (high - low), float(np.log(4)))
    return float(np.exp(low - reach)), float(np.exp(high + reach))


def common_languages(codes: NDArray[np.uint8], least: float = 0.01) -> set[int]:
    """Codes that at least this share of the rows with a known language have; 0 is an unknown language."""
    known = codes[codes != 0]
    values, counts = np.unique(known, return_counts=True)
    return {int(v) for v, n in zip(values, counts, strict=True) if n >= least * len(known)}
