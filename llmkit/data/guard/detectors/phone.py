"""Telephone numbers of people, by Google's metadata (the ``phonenumbers`` library), with our own search for candidates.

The library's matcher costs a millisecond a text and region; one regular expression finds what could be a number, and
only that is parsed. A number counts when the metadata says that it can be assigned to a person (mobile, fixed line,
VoIP, personal), and its groups are cut where the region cuts them. Toll-free, shared-cost, premium and company numbers
(080, 1588, 400, 0120, 800 …) are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmkit.data.guard.detectors import labels
from llmkit.data.guard.detectors.base import Finder, Match
from llmkit.errors import MissingError, UsageError

if TYPE_CHECKING:
    from phonenumbers import PhoneNumber

_CANDIDATE = re.compile(
    r"(?<![0-9A-Za-z_+])(?<![0-9][.,/\-:])(?<![A-Za-z]-)"
    r"\(?\+?[ ]?\(?[0-9](?:[ \-./()]{0,3}[0-9]){6,18}(?![0-9A-Za-z_]|[.,\-/:][0-9]|-[A-Za-z])"
)
_GROUP = re.compile(r"[0-9]+")
_COUNTRY_WITHOUT_PLUS = re.compile(r"(?:82|81|886)[ \-][1-9]|86[ \-]1[3-9]|00[1-9]")
# What a national number begins with, where that is known: it spares the library most of the candidates.
_FIRST = {
    "KR": re.compile(r"0[1-7]"),
    "JP": re.compile(r"0[1-9]"),
    "TW": re.compile(r"0[2-9]"),
    "CN": re.compile(r"0[1-9]|1[3-9][0-9]{9}$"),
    "US": re.compile(r"1?[2-9][0-9]{2}[2-9][0-9]{6}$"),
}
# Cuts that people make beside those of the metadata, counted in digits from the right, by country code.
_OTHER_CUTS: dict[int, tuple[frozenset[int], ...]] = {
    86: (frozenset({4, 8}), frozenset({3, 7}), frozenset({4, 7}), frozenset({5, 8})),
    82: (frozenset({4, 8}), frozenset({4, 7})),
    81: (frozenset({4, 8}),),
    886: (frozenset({4, 8}), frozenset({3, 6})),
}


class _Reading(NamedTuple):
    """A candidate read as a number of one region."""

    number: PhoneNumber
    national: str
    mobile: bool


def finder(regions: Sequence[str]) -> Finder:
    """A finder that knows the national formats of ``regions`` and international numbers of everywhere.

    Raises MissingError without the library, UsageError for a region it does not know.
    """
    try:
        import phonenumbers
    except ImportError:
        raise MissingError.extra("phonenumbers", "guard") from None
    if unknown := sorted(set(regions) - phonenumbers.SUPPORTED_REGIONS):
        raise UsageError(
            f"no phone numbers are known for {', '.join(unknown)}: regions are named by ISO 3166, as in KR, US"
        )

    def find(text: str) -> Iterator[Match]:
        for candidate in _CANDIDATE.finditer(text):
            yield from _in_candidate(text, candidate, regions)

    return find


def _in_candidate(text: str, candidate: re.Match[str], regions: Sequence[str]) -> Iterator[Match]:
    """Numbers in a run of digit groups, which may hold other numbers beside them: "2 010-1234-5678 3"."""
    groups = [(candidate.start() + m.start(), candidate.start() + m.end()) for m in _GROUP.finditer(candidate[0])]
    first = 0
    while first < len(groups):
        for last in range(len(groups) - 1, first - 1, -1):
            found = _read(text, candidate, groups[first : last + 1], regions)
            if found:
                yield found
                break
        else:
            last = first
        first = last + 1


def _read(text: str, candidate: re.Match[str], groups: list[tuple[int, int]], regions: Sequence[str]) -> Match | None:
    start, end = groups[0][0], groups[-1][1]
    digits = "".join(text[a:b] for a, b in groups)
    if not 8 <= len(digits) <= 16 or not _stands_alone(text, candidate, start, end):
        return None
    while start > candidate.start() and text[start - 1] in "+( ":
        start -= 1
    start += len(text[start:end]) - len(text[start:end].lstrip(" "))
    abroad = "+" in text[start : groups[0][0]] or bool(_COUNTRY_WITHOUT_PLUS.match(text[groups[0][0] : end]))
    reading = _international(digits) if abroad else _national(digits, regions)
    if reading is None or not _groups_fit(digits, groups, reading):
        return None
    if not _meant(text, start, end, reading, whole=len(groups) == 1, abroad=abroad):
        return None
    while text[start] == "(" and ")" not in text[start:end]:
        start += 1
    return Match(start, end, f"+{reading.number.country_code} {reading.national}")


def _stands_alone(text: str, candidate: re.Match[str], start: int, end: int) -> bool:
    """Whether only spaces (or the ends of the candidate) cut the groups off from what is beside them."""
    before, behind = text[candidate.start() : start], text[end : candidate.end()]
    return (not before.strip("+( ") or before.endswith(" ")) and (not behind or behind.startswith((" ", ")", "(", "/")))


def _international(digits: str) -> _Reading | None:
    import phonenumbers

    digits = re.sub(r"^00", "", digits)
    digits = re.sub(r"^(82|81|86|886|44|49|33)0(?=[1-9])", r"\1", digits)  # +82 (0)10…
    try:
        number = phonenumbers.parse("+" + digits, None)
    except phonenumbers.NumberParseException:
        return None
    return _personal(number) if phonenumbers.is_valid_number(number) and not _nobodys(number) else None


def _national(digits: str, regions: Sequence[str]) -> _Reading | None:
    import phonenumbers

    for region in regions:
        if region in _FIRST and not _FIRST[region].match(digits):
            continue
        try:
            number = phonenumbers.parse(digits, region)
        except phonenumbers.NumberParseException:
            continue
        if not phonenumbers.is_valid_number_for_region(number, region):
            continue
        if _nobodys(number):
            return None
        if reading := _personal(number):
            return reading
    return None


def _nobodys(number: PhoneNumber) -> bool:
    """555-01xx is kept for fiction, 010-0xxx is not given out, whatever the metadata says: pseudonyms are made of them."""
    national = str(number.national_number)
    return (number.country_code == 1 and national[3:8] == "55501") or (
        number.country_code == 82 and national[:3] == "100"
    )


def _personal(number: PhoneNumber) -> _Reading | None:
    """The reading if a person can have the number: not toll-free and its like."""
    from phonenumbers import PhoneNumberType, national_significant_number, number_type

    kind = number_type(number)
    national = national_significant_number(number)
    if kind not in (
        PhoneNumberType.MOBILE,
        PhoneNumberType.FIXED_LINE,
        PhoneNumberType.FIXED_LINE_OR_MOBILE,
        PhoneNumberType.VOIP,
        PhoneNumberType.PERSONAL_NUMBER,
    ):
        return None
    return _Reading(number, national, mobile=kind == PhoneNumberType.MOBILE)


def _groups_fit(digits: str, groups: list[tuple[int, int]], reading: _Reading) -> bool:
    """Whether the number is cut only where its region cuts it, so that a date and a time are not one number."""
    import phonenumbers

    cuts, right = set(), 0
    for start, end in reversed(groups[1:]):
        right += end - start
        cuts.add(right)
    cuts = {cut for cut in cuts if cut < len(reading.national)}  # country code and trunk prefix may stand alone
    if len(digits) > len(reading.national) + 6:
        return False
    formatted = phonenumbers.format_number(reading.number, phonenumbers.PhoneNumberFormat.INTERNATIONAL)
    usual, right = set(), 0
    for group in reversed(_GROUP.findall(formatted)[1:]):
        right += len(group)
        usual.add(right)
    return any(cuts <= allowed for allowed in (usual, *_OTHER_CUTS.get(reading.number.country_code or 0, ())))


def _meant(text: str, start: int, end: int, reading: _Reading, *, whole: bool, abroad: bool) -> bool:
    """Whether the shape or a label says telephone: a bare run of digits must be a mobile number or stand beside a label."""
    if reading.mobile and not whole:
        return True
    label = labels.of(text, start, end)
    if label == "phone":
        return True
    return label is None and (not whole or abroad or reading.mobile)
