"""Which language a text is in, told from its script, and among languages of one script from their commonest words.

No model and no package: enough to see that an English answer stands among Korean ones. Texts of a few words in Latin
letters, and languages that are not in the table, are not told ("").
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

# The commonest short words; a word that two languages share counts for both.
_WORDS: dict[str, str] = {
    "en": "the of and to in is that it for was on are with as be this have from or by you not at what how which can an your i "
    "do my me we he she they was were has had will would could should why when where there any get if so am did does been just into than our no a",
    "de": "der die und das ist in den von zu mit nicht ein eine auf für es im dem sich auch als wird an wie sind oder ich sie wir",
    "fr": "le la les de des et est en un une du que qui dans pour pas sur au avec ce il elle sont par plus vous nous je ou",
    "es": "el la los las de que y en un una es por con para se del no su al lo como más pero sus este son qué yo está",
    "pt": "o a os as de que e em um uma é por com para se do da não no na ao mais como mas foi são você dos das eu está",
    "it": "il la le di che e è in un una per con non si del della da sono i gli al come più ma anche questo nel lo",
    "nl": "de het een en van is dat in op te voor met niet zijn aan er die wordt ook als bij naar maar om ik je kan door",
    "pl": "i w na z do nie się jest że to o jak po co dla od za przez są czy ale tylko był może już tego jego",
    "tr": "ve bir bu için ile da de olarak daha çok en gibi olan değil ne var mi mı o ama kadar ben sonra her",
    "vi": "là của và các có cho không được trong một với những người để này đã khi từ về như bạn ở đến ra vào",
    "id": "yang dan di untuk dengan ini dari pada adalah itu dalam tidak akan ke atau juga saya anda oleh bisa ada karena sebagai",
    "sv": "och i att det som en på är av för med till den har inte om ett var jag men så kan från vi eller",
    "ru": "и в не на что с как это по из у за от но для к так же он она они мы вы его все быть я",
    "uk": "і в не на що з як це до та за від але для його він вона ми ви є про який було також я",
}  # fmt: skip
_SCRIPTS: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (
    ("hangul", ((0xAC00, 0xD7A3), (0x1100, 0x11FF), (0x3130, 0x318F))),
    ("kana", ((0x3041, 0x30FF),)),
    ("han", ((0x3400, 0x4DBF), (0x4E00, 0x9FFF))),
    ("latin", ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF))),
    ("cyrillic", ((0x400, 0x4FF),)),
    ("ar", ((0x600, 0x6FF),)),
    ("th", ((0xE00, 0xE7F),)),
    ("hi", ((0x900, 0x97F),)),
    ("el", ((0x370, 0x3FF),)),
    ("he", ((0x590, 0x5FF),)),
)
_LOOK_AT = 1_000
_FEWEST_LETTERS = 4
_FEWEST_WORDS = 4
# One character of these scripts says as much as several letters.
_WEIGHT = {"hangul": 2, "kana": 2, "han": 3}
_COMMON = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_PUNCTUATION = str.maketrans(dict.fromkeys(".,;:!?\"'()[]{}<>«»“”‘’…-–—/", " "))
LANGUAGES = ("ko", "ja", "zh", *_WORDS, "ar", "th", "hi", "el", "he")
"""Languages that ``detect`` can name (ISO 639-1)."""


def detect(text: str) -> str:
    """ISO 639-1 code of the language most of the text is in, by its first thousand characters; ``""`` if unclear."""
    return detect_all([text])[0]


def detect_all(texts: Sequence[str]) -> list[str]:
    """``detect`` of many texts at once."""
    heads = [text[:_LOOK_AT] for text in texts]
    codes = np.frombuffer("".join(heads).encode("utf-32-le", "surrogatepass"), np.uint32)
    owners = np.repeat(np.arange(len(heads)), [len(head) for head in heads])
    width = len(_SCRIPTS) + 1
    counts = np.bincount(owners * width + _script_of()[codes], minlength=len(heads) * width).reshape(-1, width)[:, 1:]
    return [_language(head, row) for head, row in zip(heads, counts.tolist(), strict=True)]


@cache
def _script_of() -> NDArray[np.uint8]:
    """Number of every code point's script in _SCRIPTS, from 1; 0 for what tells nothing."""
    table = np.zeros(0x110000, np.uint8)
    for number, (_, ranges) in enumerate(_SCRIPTS, 1):
        for first, last in ranges:
            table[first : last + 1] = number
    return table


def _language(text: str, counts: list[int]) -> str:
    letters = sum(counts)
    if letters < _FEWEST_LETTERS:
        return ""
    weights = {name: count * _WEIGHT.get(name, 1) for (name, _), count in zip(_SCRIPTS, counts, strict=True)}
    east = {name: weights[name] for name in ("hangul", "kana", "han")}
    if 2 * sum(east.values()) >= sum(weights.values()):
        return _east_asian(east)
    script = max(weights, key=lambda name: weights[name])
    return _by_words(text) if script in ("latin", "cyrillic") else script


def _east_asian(weights: dict[str, int]) -> str:
    """Japanese writes Han with Kana between, Korean hardly any Han."""
    if weights["kana"] * 8 >= weights["han"] and weights["kana"] > weights["hangul"]:
        return "ja"
    return "ko" if weights["hangul"] >= weights["han"] else "zh"


def _by_words(text: str) -> str:
    """The language of whose common words the text holds most, if it is clearly ahead."""
    words = set(text.lower().translate(_PUNCTUATION).split())
    if len(words) < _FEWEST_WORDS:
        return ""
    ranked = sorted(((len(words & common), language) for language, common in _COMMON.items()), reverse=True)
    (most, first), (second, _) = ranked[:2]
    return first if most >= max(2, len(words) / 12) and most >= 1.5 * second else ""
