"""International bank account numbers (ISO 13616): country, its length and structure, and the remainder 1 modulo 97."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from llmkit.data.guard.detectors.base import Match

# BBAN of each country in the notation of the IBAN registry (n digits, a capitals, c either), without the "!".
STRUCTURES: dict[str, str] = dict(
    line.split()
    for line in """
    AD 4n4n12c
    AE 3n16n
    AL 8n16c
    AT 5n11n
    AZ 4a20c
    BA 3n3n8n2n
    BE 3n7n2n
    BG 4a4n2n8c
    BH 4a14c
    BI 5n5n11n2n
    BR 8n5n10n1a1c
    BY 4c4n16c
    CH 5n12c
    CR 4n14n
    CY 3n5n16c
    CZ 4n6n10n
    DE 8n10n
    DJ 5n5n11n2n
    DK 4n9n1n
    DO 4c20n
    EE 2n2n11n1n
    EG 4n4n17n
    ES 4n4n1n1n10n
    FI 3n11n
    FK 2a12n
    FO 4n9n1n
    FR 5n5n11c2n
    GB 4a6n8n
    GE 2a16n
    GI 4a15c
    GL 4n9n1n
    GR 3n4n16c
    GT 4c20c
    HN 4a20n
    HR 7n10n
    HU 3n4n1n15n1n
    IE 4a6n8n
    IL 3n3n13n
    IQ 4a3n12n
    IS 4n2n6n10n
    IT 1a5n5n12c
    JO 4a4n18c
    KW 4a22c
    KZ 3n13c
    LB 4n20c
    LC 4a24c
    LI 5n12c
    LT 5n11n
    LU 3n13c
    LV 4a13c
    LY 3n3n15n
    MC 5n5n11c2n
    MD 2c18c
    ME 3n13n2n
    MK 3n10c2n
    MN 4n12n
    MR 5n5n11n2n
    MT 4a5n18c
    MU 4a2n2n12n3n3a
    NI 4a20n
    NL 4a10n
    NO 4n6n1n
    OM 3n16c
    PK 4a16c
    PL 8n16n
    PS 4a21c
    PT 4n4n11n2n
    QA 4a21c
    RO 4a16c
    RS 3n13n2n
    RU 9n5n15c
    SA 2n18c
    SC 4a2n2n16n3a
    SD 2n12n
    SE 3n16n1n
    SI 5n8n2n
    SK 4n6n10n
    SM 1a5n5n12c
    SO 4n3n12n
    ST 4n4n11n2n
    SV 4a20n
    TL 3n14n2n
    TN 2n3n13n2n
    TR 5n1n16c
    UA 6n19c
    VA 3n15n
    VG 4a16n
    XK 4n10n2n
    YE 4a4n18c
    """.strip().splitlines()
)
_CLASSES = {"n": "[0-9]", "a": "[A-Z]", "c": "[A-Z0-9]"}
_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?=[ \-]?[A-Za-z0-9]{2})")
_CHARACTER = re.compile(r"[ \-]?([A-Za-z0-9])")


def find(text: str) -> Iterator[Match]:
    """Account numbers written whole or in groups, in capitals or not."""
    for start in _START.finditer(text):
        structure = STRUCTURES.get(start[0][:2].upper())
        if structure is None:
            continue
        found = _take(text, start.start(), length(structure))
        if found and is_iban(found[0]):
            yield Match(start.start(), found[1], found[0])


def _take(text: str, start: int, count: int) -> tuple[str, int] | None:
    """``count`` letters and digits from ``start`` on, single separators left out, and where they end."""
    taken = []
    at = start
    for _ in range(count):
        match = _CHARACTER.match(text, at)
        if match is None:
            return None
        taken.append(match[1])
        at = match.end()
    return None if text[at : at + 1].isascii() and text[at : at + 1].isalnum() else ("".join(taken).upper(), at)


def length(structure: str) -> int:
    """Characters of the whole IBAN: country, check digits and BBAN."""
    return 4 + sum(int(count) for count in re.findall(r"[0-9]+", structure))


@cache
def _bban(country: str) -> re.Pattern[str]:
    parts = re.findall(r"([0-9]+)([nac])", STRUCTURES[country])
    return re.compile("".join(f"{_CLASSES[kind]}{{{count}}}" for count, kind in parts))


def is_iban(value: str) -> bool:
    """Whether ``value`` (capitals, no spaces) has the structure of its country and passes ISO 7064 MOD 97-10."""
    if not _bban(value[:2]).fullmatch(value[4:]) or not 2 <= int(value[2:4]) <= 98:
        return False
    return int("".join(str(int(char, 36)) for char in value[4:] + value[:4])) % 97 == 1
