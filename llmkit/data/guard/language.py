"""Which language a text is in, told from its script, and among languages of one script from their commonest words.

No model and no package: enough to see that an English answer stands among Korean ones. Texts of a few words in Latin
letters, and languages that are not in the table, are not told ("").
"""

from __future__ import annotations

import re
from collections import Counter

# The commonest short words; a word that two languages share counts for both.
_WORDS: dict[str, str] = {
    "en": "the of and to in is that it for was on are with as be this have from or by you not at what how which can an your i",
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
_SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("hangul", re.compile(r"[\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f]")),
    ("kana", re.compile(r"[\u3041-\u30ff]")),
    ("han", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")),
    ("latin", re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")),
    ("cyrillic", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("th", re.compile(r"[\u0e00-\u0e7f]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
    ("el", re.compile(r"[\u0370-\u03ff]")),
    ("he", re.compile(r"[\u0590-\u05ff]")),
)
_WORD = re.compile(r"[^\W\d_]+")
_LOOK_AT = 1_000
_FEWEST_LETTERS = 4
_FEWEST_WORDS = 4
# One character of these scripts says as much as several letters.
_WEIGHT = {"hangul": 2, "kana": 2, "han": 3}
_OF_WORD: dict[str, list[str]] = {}
for _language, _text in _WORDS.items():
    for _word in _text.split():
        _OF_WORD.setdefault(_word, []).append(_language)
LANGUAGES = ("ko", "ja", "zh", *_WORDS, "ar", "th", "hi", "el", "he")
"""Languages that ``detect`` can name (ISO 639-1)."""


def detect(text: str) -> str:
    """ISO 639-1 code of the language most of the text is in, by its first thousand characters; ``""`` if unclear."""
    text = text[:_LOOK_AT]
    counts = {
        name: len(pattern.findall(text)) for name, pattern in _SCRIPTS if not (name != "latin" and text.isascii())
    }
    weights = {name: count * _WEIGHT.get(name, 1) for name, count in counts.items()}
    total = sum(weights.values())
    if not total or sum(counts.values()) < _FEWEST_LETTERS:
        return ""
    east = {name: weights.get(name, 0) for name in ("hangul", "kana", "han")}
    if 2 * sum(east.values()) >= total:
        return _east_asian(east)
    script = max(weights, key=lambda name: weights[name])
    return _by_words(text) if script in ("latin", "cyrillic") else script


def _east_asian(weights: dict[str, int]) -> str:
    """Japanese writes Han with Kana between, Korean hardly any Han."""
    if weights["kana"] * 8 >= weights["han"] and weights["kana"] > weights["hangul"]:
        return "ja"
    return "ko" if weights["hangul"] >= weights["han"] else "zh"


def _by_words(text: str) -> str:
    """The language whose common words the text holds most of, if it is clearly ahead."""
    words = _WORD.findall(text.lower())
    found: Counter[str] = Counter()
    for word in set(words):
        found.update(_OF_WORD.get(word, ()))
    if len(words) < _FEWEST_WORDS or not found:
        return ""
    (first, most), (_, second) = [*found.most_common(2), ("", 0)][:2]
    return first if most >= max(2, len(set(words)) / 12) and most > second else ""
