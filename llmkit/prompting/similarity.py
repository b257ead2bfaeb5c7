"""How like two texts are: edit distance, ROUGE-N and BLEU, for Korean, Chinese and Japanese as for spaced languages.

All three are defined over units of text. Spaced languages have words; Han, kana and Hangul are taken by character,
because they have no spaces between words, or spaces between what a search engine would call phrases.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_CJK = (
    "\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3100-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f"
    "\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNIT = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_CHARACTER = re.compile(rf"([{_CJK}\u3000-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65])")
# The rules of mteval-v13a, by which sacrebleu's numbers are made: punctuation stands alone, but 1,000.5 stays whole.
_BLEU_RULES = (
    (re.compile(r"([\{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def units(text: str) -> list[str]:
    """Words in lower case without punctuation; Han, kana and Hangul one character each."""
    return _UNIT.findall(text.lower())


def bleu_units(text: str) -> list[str]:
    """Tokens as sacrebleu's ``13a`` has them, with Han, kana and Hangul one character each (its ``zh`` does the same)."""
    text = " " + _CHARACTER.sub(r" \1 ", text.replace("\n", " ")) + " "
    for pattern, replacement in _BLEU_RULES:
        text = pattern.sub(replacement, text)
    return text.split()


def levenshtein(a: str, b: str) -> int:
    """Fewest characters to insert, delete or replace to make ``b`` of ``a`` (Levenshtein 1966)."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def rouge_n(text: str, references: Sequence[str], n: int = 1) -> float:
    """ROUGE-N as an F1 of 0 to 1 against the best reference (Lin, 2004: ROUGE, a package for automatic evaluation).

    Without stemming, so that it is the same rule in every language.
    """
    found = _ngrams(units(text), n)
    best = 0.0
    for reference in references:
        wanted = _ngrams(units(reference), n)
        shared = (found & wanted).total()
        if shared:
            best = max(best, 2 * shared / (found.total() + wanted.total()))
    return best


def bleu(text: str, references: Sequence[str], order: int = 4) -> float:
    """BLEU of one text, 0 to 1 (Papineni et al., 2002), smoothed as sacrebleu's ``sentence_bleu`` does.

    Precisions of n-grams up to ``order`` (fewer in a shorter text), where one that is 0 counts half, a quarter, … of a
    match (method 3 of Chen and Cherry, 2014); the brevity penalty takes the reference of the closest length.
    """
    tokens = bleu_units(text)
    wanted = [bleu_units(reference) for reference in references]
    if not tokens or not any(wanted):
        return 0.0
    logs, smooth, matched = [], 1.0, 0
    for n in range(1, min(order, len(tokens)) + 1):
        found = _ngrams(tokens, n)
        most: Counter[tuple[str, ...]] = Counter()
        for reference in wanted:
            most |= _ngrams(reference, n)
        shared = (found & most).total()
        matched += shared
        if not shared:
            smooth *= 2
        logs.append(math.log((shared or 1 / smooth) / found.total()))
    if not matched:
        return 0.0
    length = min((len(reference) for reference in wanted), key=lambda size: (abs(size - len(tokens)), size))
    penalty = min(0.0, 1 - length / len(tokens))
    return math.exp(sum(logs) / len(logs) + penalty)
