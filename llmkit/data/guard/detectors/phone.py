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
    r"(?<![0-9A-Za-z_+])(?<![0-9][.\-:])(?<![A-Za-z]-)"
    r"\(?\+?\(?[0-9](?:(?:[ ]?-[ ]?|[.·]|[ ]{1,2}|[ ]?\(|\)[ ]?-?)?[0-9]){6,18}(?![0-9A-Za-z_]|[.\-:][0-9]|-[A-Za-z])"
)
_DECIMAL = re.compile(r"(?:0|[1-9][0-9]*)\.[0-9]+")
_COUNTING = "01234567890123456789"
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


_LONGEST_BARE = 11  # digits of a mobile number in the regions we know best; longer runs are order numbers


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
            if found := _read(text, candidate, groups[first : last + 1], regions):
                yield found
                break
        else:
            if "+" in candidate[0]:
                return  # what follows a country code is no number by itself
            last = first
        first = last + 1


def _read(text: str, candidate: re.Match[str], groups: list[tuple[int, int]], regions: Sequence[str]) -> Match | None:
    start, end = groups[0][0], groups[-1][1]
    digits = "".join(text[a:b] for a, b in groups)
    if not 8 <= len(digits) <= 16 or not _stands_alone(text, candidate, start, end):
        return None
    if _DECIMAL.fullmatch(text, start, end) or digits in _COUNTING:
        return None
    start, body = _with_signs(text, candidate.start(), start, end), text[start:end]
    abroad = "+" in text[start : groups[0][0]] or bool(_COUNTRY_WITHOUT_PLUS.match(body))
    if labels.in_longer_run(text, start, end) or (not abroad and _is_odd(text, start, end)):
        return None
    readings = _international(digits) if abroad else _national(digits, regions)
    for reading in sorted(readings, key=lambda reading: not reading.mobile):
        fits = abroad or _groups_fit(groups, reading)
        if fits and _meant(text, start, end, reading, whole=len(groups) == 1, abroad=abroad):
            return Match(start, end, f"+{reading.number.country_code} {reading.national}")
    return None


def _is_odd(text: str, start: int, end: int) -> bool:
    """Whether a number is written as national ones never are: a bracket inside, points and dashes, in a calculation."""
    inside = text[start + 1 : end]
    return "(" in inside or ("." in inside and "-" in inside) or labels.in_arithmetic(text, start, end)


def _with_signs(text: str, first: int, start: int, end: int) -> int:
    """``start`` with the plus and the bracket before it, unless the bracket is closed after the number only."""
    while start > first and text[start - 1] in "+(":
        start -= 1
    while text[start] == "(" and text.count("(", start, end) > text.count(")", start, end):
        start += 1
    return start


def _stands_alone(text: str, candidate: re.Match[str], start: int, end: int) -> bool:
    """Whether only spaces (or the ends of the candidate) cut the groups off from what is beside them."""
    before, behind = text[candidate.start() : start], text[end : candidate.end()]
    return (not before.strip("+( ") or before.endswith(" ")) and (not behind or behind.startswith((" ", ")", "(")))


def _international(digits: str) -> list[_Reading]:
    import phonenumbers

    digits = re.sub(r"^00", "", digits)
    digits = re.sub(r"^(82|81|86|886|44|49|33)0(?=[1-9])", r"\1", digits)  # +82 (0)10…
    try:
        number = phonenumbers.parse("+" + digits, None)
    except phonenumbers.NumberParseException:
        return []
    return _personal(number) if phonenumbers.is_valid_number(number) and not _nobodys(number) else []


def _national(digits: str, regions: Sequence[str]) -> list[_Reading]:
    """What the digits can be in each region; nothing where one of them is a number that nobody has."""
    import phonenumbers

    readings: list[_Reading] = []
    for region in regions:
        if region in _FIRST and not _FIRST[region].match(digits):
            continue
        try:
            number = phonenumbers.parse(digits, region)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number_for_region(number, region):
            if _nobodys(number):
                return []
            readings += _personal(number)
    return readings


def _nobodys(number: PhoneNumber) -> bool:
    """555-01xx is kept for fiction, 010-0xxx is not given out, whatever the metadata says: pseudonyms are made of them."""
    national = str(number.national_number)
    return (number.country_code == 1 and national[3:8] == "55501") or (
        number.country_code == 82 and national[:3] == "100"
    )


def _personal(number: PhoneNumber) -> list[_Reading]:
    """The number if a person can have it: not toll-free and its like."""
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
        return []
    return [_Reading(number, national, mobile=kind in (PhoneNumberType.MOBILE, PhoneNumberType.PERSONAL_NUMBER))]


def _groups_fit(groups: list[tuple[int, int]], reading: _Reading) -> bool:
    """Whether the number is cut where its region cuts it, its area code at least, so that a date and a time are none."""
    import phonenumbers

    formatted = phonenumbers.format_number(reading.number, phonenumbers.PhoneNumberFormat.INTERNATIONAL)
    usual = _cuts([len(group) for group in _GROUP.findall(formatted)[1:]])
    cuts = _cuts([end - start for start, end in groups])
    cuts = {cut for cut in cuts if cut < len(reading.national)}  # the trunk prefix may stand alone
    known = (usual, *_OTHER_CUTS.get(reading.number.country_code or 0, ()))
    return not cuts or any(cuts <= allowed and max(allowed) in cuts for allowed in known if allowed)


def _cuts(lengths: list[int]) -> set[int]:
    """Where groups of these lengths are cut, in digits from the right."""
    return {sum(lengths[at:]) for at in range(1, len(lengths))}


def _meant(text: str, start: int, end: int, reading: _Reading, *, whole: bool, abroad: bool) -> bool:
    """Whether the shape or a label says telephone: a bare run of digits must be a mobile number or stand beside a label."""
    if reading.mobile and not whole:
        return True
    label = labels.of(text, start, end)
    if label == "phone":
        return True
    return label is None and (not whole or abroad or (reading.mobile and end - start <= _LONGEST_BARE))
