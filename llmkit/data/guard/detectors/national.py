"""Numbers that states give to people: Korea, China, Taiwan, the United States.

Sources: the Korean resident registration rules (weights 2-9, 2-5; from 2020-10-05 new numbers end in random digits),
GB 11643-1999 with ISO 7064 MOD 11-2, the check of Taiwan's national ID and of its resident certificates (format of
2021 and the one before), and the Social Security Administration's rules for area, group and serial.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date

from llmkit.data.guard.detectors import labels
from llmkit.data.guard.detectors.base import Match

_LEFT = r"(?<![0-9A-Za-z_])(?<![0-9][.\-])"
_RIGHT = r"(?![0-9A-Za-z_]|[.\-][0-9]|-[A-Za-z])"


def _day(year: int, month: int, day: int) -> date | None:
    """The date, if it is one between 1900 and today."""
    try:
        found = date(year, month, day)
    except ValueError:
        return None
    return found if year >= 1900 and found <= date.today() else None


def _weighted(digits: str, weights: tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


# --- Korea ----------------------------------------------------------------------------------------------------------

_RRN = re.compile(rf"{_LEFT}([0-9]{{6}})(\s?-\s?| )?([1-8][0-9]{{6}}){_RIGHT}")
_RRN_WEIGHTS = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
_RANDOM_SINCE = date(2020, 10, 5)
# Barcodes of Korea, China, Japan and Taiwan also begin like a date; with a right EAN check digit they are barcodes.
_BARCODE = re.compile(r"880|69[0-9]|45|49|471")


def find_kr_rrn(text: str) -> Iterator[Match]:
    """Resident and foreigner registration numbers, 13 digits.

    A right check digit is enough. Numbers given since 2020-10-05 have none: they count beside a label, and without one
    those of citizens born since then, written with the hyphen.
    """
    for match in _RRN.finditer(text):
        digits = match[1] + match[3]
        born = _rrn_birth(digits)
        if born is None or labels.in_arithmetic(text, *match.span()):
            continue
        label = labels.of(text, *match.span())
        if label == "kr_rrn" or (label != "other" and _is_plain_rrn(digits, match[2] or "", born)):
            yield Match(match.start(), match.end(), digits)


def _is_plain_rrn(digits: str, separator: str, born: date) -> bool:
    if rrn_check(digits):
        return bool(separator) or not (_BARCODE.match(digits) and _ean13(digits))
    return "-" in separator and born >= _RANDOM_SINCE and digits[6] in "34"


def _rrn_birth(digits: str) -> date | None:
    century = 1900 if digits[6] in "1256" else 2000
    return _day(century + int(digits[:2]), int(digits[2:4]), int(digits[4:6]))


def rrn_check(digits: str) -> bool:
    """Whether the last of 13 digits is the check digit; foreigners' numbers (seventh digit 5 to 8) add 2 to it."""
    offset = 13 if digits[6] in "5678" else 11
    return (offset - _weighted(digits, _RRN_WEIGHTS) % 11) % 10 == int(digits[12])


def _ean13(digits: str) -> bool:
    return _weighted(digits, (1, 3) * 6 + (1,)) % 10 == 0


# --- China ----------------------------------------------------------------------------------------------------------

_CN = re.compile(rf"{_LEFT}([1-9][0-9]{{5}})([ \-]?)([12][0-9]{{3}}[01][0-9][0-3][0-9])\2([0-9]{{3}}[0-9Xx]){_RIGHT}")
_CN_OLD = re.compile(rf"{_LEFT}([1-9][0-9]{{5}})([0-9]{{2}}[01][0-9][0-3][0-9])([0-9]{{3}}){_RIGHT}")
_CN_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
# GB/T 2260 provinces; 71, 81 to 83 for Taiwan, Hong Kong and Macao; 91 to 93 for foreigners with permanent residence.
_PROVINCES = frozenset(
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 82 83 91 92 93".split()
)


def find_cn_id(text: str) -> Iterator[Match]:
    """18-character citizen numbers with region, date and check character; 15-digit ones (before 1999) beside a label."""
    for match in _CN.finditer(text):
        value = (match[1] + match[3] + match[4]).upper()
        if is_cn_id(value):
            yield Match(match.start(), match.end(), value)
    for match in _CN_OLD.finditer(text):
        born = _day(1900 + int(match[2][:2]), int(match[2][2:4]), int(match[2][4:]))
        if born and match[1][:2] in _PROVINCES and labels.of(text, *match.span()) == "cn_id":
            yield Match(match.start(), match.end(), match[0])


def is_cn_id(value: str) -> bool:
    """Whether 18 characters have a province, a date up to today and the check character of MOD 11-2."""
    if value[:2] not in _PROVINCES or not _day(int(value[6:10]), int(value[10:12]), int(value[12:14])):
        return False
    return "10X98765432"[_weighted(value[:17], _CN_WEIGHTS) % 11] == value[17]


# --- Taiwan ---------------------------------------------------------------------------------------------------------

_TW = re.compile(rf"{_LEFT}(?:[A-Z][1289][0-9]{{8}}|[A-Z][A-D][0-9]{{8}}){_RIGHT}")
_TW_LOWER = re.compile(rf"{_LEFT}(?:[a-z][1289][0-9]{{8}}|[a-z][a-d][0-9]{{8}}){_RIGHT}")
_TW_LETTERS = {letter: 10 + place for place, letter in enumerate("ABCDEFGHJKLMNPQRSTUVXYWZIO")}
_TW_WEIGHTS = (1, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1)


def find_tw_id(text: str) -> Iterator[Match]:
    """National IDs (A1…, A2…), resident certificates since 2021 (A8…, A9…) and before (AA… to AD…).

    In small letters they count beside a label only: a letter and nine digits is what many product codes look like.
    """
    for pattern, needs_label in ((_TW, False), (_TW_LOWER, True)):
        for match in pattern.finditer(text):
            value = match[0].upper()
            if not tw_check(value):
                continue
            label = labels.of(text, *match.span())
            if label in ("tw_id", "cn_id") or (label != "other" and not needs_label):
                yield Match(match.start(), match.end(), value)


def tw_check(value: str) -> bool:
    """Whether the weighted sum of ten characters is divisible by ten; a letter counts as two digits, a second one as one."""
    second = str(_TW_LETTERS[value[1]] % 10) if value[1].isalpha() else value[1]
    return _weighted(f"{_TW_LETTERS[value[0]]}{second}{value[2:]}", _TW_WEIGHTS) % 10 == 0


# --- United States --------------------------------------------------------------------------------------------------

_SSN = re.compile(rf"{_LEFT}(?!000|666|9)([0-9]{{3}})([ \-]?)(?!00)([0-9]{{2}})\2(?!0000)([0-9]{{4}}){_RIGHT}")


def find_us_ssn(text: str) -> Iterator[Match]:
    """Social security numbers: with dashes unless a label says otherwise, with spaces or bare only beside their label."""
    for match in _SSN.finditer(text):
        label = labels.of(text, *match.span())
        if label == "us_ssn" or (match[2] == "-" and label not in ("other", "phone")):
            yield Match(match.start(), match.end(), match[1] + match[3] + match[4])
