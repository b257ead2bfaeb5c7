"""Text that was decoded with the wrong character set (mojibake), or has lost characters.

What Western character sets do to UTF-8 is ftfy's field (its ``badness``). For Korean, Chinese and Japanese: text of
one character set that reads as valid text in the other is told by reading it back.
"""

from __future__ import annotations

import codecs
import re
from functools import cache
from itertools import islice
from typing import Any

from llmkit.errors import MissingError

_MIXED = re.compile(r"[\u00a1-\u00fe]{6,}")
_CONTROLS = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x80-\x9f]")
_EAST_ASIAN = re.compile(r"[\u3040-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7a3\uff00-\uffef]")
_RUN = re.compile(r"[\u0370-\uffff]{4,24}")
_RUNS = 2
_utf8 = codecs.getincrementaldecoder("utf-8")
_LEGACY = ("cp949", "gbk", "cp932", "big5")


@cache
def _bad() -> Any:
    """ftfy's pattern of unlikely sequences. Raises MissingError where ftfy is not installed."""
    try:
        from ftfy.badness import BADNESS_RE
    except ImportError:
        raise MissingError.extra("ftfy", "guard") from None
    return BADNESS_RE


def damage(text: str) -> str:
    """What is wrong with a text's characters, in words; ``""`` for nothing."""
    if text.isascii():
        return "control characters" if _CONTROLS.search(text) else ""
    if "\ufffd" in text:
        return "replacement characters (U+FFFD): bytes that could not be decoded"
    if _CONTROLS.search(text):
        return "control characters"
    if _reads_as_east_asian(text):
        return "Korean, Chinese or Japanese bytes read as Latin-1"
    if _bad().search(text) and _is_double_encoded(text):
        return "UTF-8 read as another character set"
    legacy = _utf8_read_as_legacy(text)
    return f"UTF-8 read as {legacy}" if legacy else ""


def _is_double_encoded(text: str) -> bool:
    """ftfy finds sequences nobody writes; whether undoing the mistake makes the text better is its decision too."""
    from ftfy import TextFixerConfig, fix_encoding

    return fix_encoding(text, TextFixerConfig(explain=False)) != text


def _reads_as_east_asian(text: str) -> bool:
    """A run of accented letters and signs, as no language has it, that is valid text in a legacy character set."""
    for run in _MIXED.findall(text):
        raw = run[: len(run) // 2 * 2].encode("latin-1")
        for charset in _LEGACY:
            try:
                read = raw.decode(charset)
            except UnicodeDecodeError:
                continue
            if len(_EAST_ASIAN.findall(read)) == len(read):
                return True
    return False


def _utf8_read_as_legacy(text: str) -> str:
    """The character set whose bytes for a run of this text are valid UTF-8 of an East Asian script; rarely by chance."""
    for run in islice(_RUN.finditer(text), _RUNS):
        for charset in _LEGACY:
            try:
                read = _utf8().decode(run.group().encode(charset))  # of a cut run, the last character may be cut
            except UnicodeError:
                continue
            if len(read) >= 3 and all(map(_EAST_ASIAN.match, read)):
                return charset
    return ""
