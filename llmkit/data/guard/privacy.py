"""Personal data in text: find it, and replace it by placeholders or pseudonyms.

::

    guard = PrivacyFilter(DEFAULT_KINDS, "redact")
    guard.find("mail kim@corp.co.kr")                  # [Finding("email", 5, 19)]
    guard.clean("mail kim@corp.co.kr", document=1)     # "mail <EMAIL>"

What is found, what is not and why: docs/privacy.md. How well: benchmarks/guard.py.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

from llmkit.data.guard import pseudonyms
from llmkit.data.guard.audit import Audit
from llmkit.data.guard.detectors import card, email, iban, ip, national, phone, presidio, secret
from llmkit.data.guard.detectors.base import Finder
from llmkit.data.guard.detectors.text import normalize
from llmkit.data.guard.kinds import DEFAULT_KINDS, DEFAULT_REGIONS, Action, Finding, Kind
from llmkit.errors import UsageError

__all__ = [
    "DEFAULT_KINDS",
    "DEFAULT_REGIONS",
    "KINDS",
    "Action",
    "Audit",
    "Cleaned",
    "Finding",
    "Kind",
    "PrivacyFilter",
]


class Hint(NamedTuple):
    """What a text must have for a finder to be worth running, and how far around it the finder has to look.

    ``before`` and ``behind``, in characters, reach over the longest value and the words that label it.
    """

    pattern: re.Pattern[str]
    before: int
    behind: int
    signs: tuple[str, ...] = ()
    """Where given, a text without any of them has no match: plain search is faster than the pattern."""

    def windows(self, text: str) -> list[tuple[int, int]]:
        """Parts of ``text`` to look at, apart and in order."""
        if self.signs and not any(sign in text for sign in self.signs):
            return []
        windows: list[tuple[int, int]] = []
        for match in self.pattern.finditer(text):
            start, end = max(0, match.start() - self.before), match.end() + self.behind
            if windows and start <= windows[-1][1]:
                start = windows.pop()[0]
            windows.append((start, end))
        return windows


class Detector(NamedTuple):
    """A kind of personal data. ``ready`` makes its finder for some phone regions (others ignore them).

    Without a ``hint`` the finder reads every text whole.
    """

    ready: Callable[[Sequence[str]], Finder]
    hint: Hint | None
    pseudonym: Callable[[str, str, pseudonyms.Draw], str]


# Seven digits close together, an address of numbers and points or colons, the beginning of an IBAN.
_DIGITS = Hint(
    re.compile(
        r"[0-9](?:(?:[ \-./()]{0,3}[0-9]){6}|[0-9]{0,2}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]|[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2}"
        r"|(?<=[A-Za-z]{2}[0-9]{2})(?:[A-Za-z0-9]{8}|[ \-][A-Za-z0-9]{4}[ \-]))"
    ),
    before=64,
    behind=64,
)
_AT = Hint(
    re.compile(r"@|골뱅이|(?:at|AT)\s?[)\]}>]"),
    before=128,
    behind=192,
    signs=("@", "골뱅이", "at)", "at]", "at}", "at>", "at )", "at ]", "AT)", "AT]", "AT}"),
)


def _plain(find: Finder) -> Callable[[Sequence[str]], Finder]:
    return lambda _regions: find


KINDS: dict[Kind, Detector] = {
    "secret": Detector(_plain(secret.find), None, pseudonyms.secret),
    "iban": Detector(_plain(iban.find), _DIGITS, pseudonyms.iban),
    "cn_id": Detector(_plain(national.find_cn_id), _DIGITS, pseudonyms.cn_id),
    "card": Detector(_plain(card.find), _DIGITS, pseudonyms.card),
    "kr_rrn": Detector(_plain(national.find_kr_rrn), _DIGITS, pseudonyms.kr_rrn),
    "tw_id": Detector(_plain(national.find_tw_id), _DIGITS, pseudonyms.tw_id),
    "us_ssn": Detector(_plain(national.find_us_ssn), _DIGITS, pseudonyms.us_ssn),
    "email": Detector(_plain(email.find), _AT, pseudonyms.email),
    "ip": Detector(_plain(ip.find), _DIGITS, pseudonyms.ip),
    "phone": Detector(phone.finder, _DIGITS, pseudonyms.phone),
    "name": Detector(lambda _regions: presidio.finder("name"), None, pseudonyms.name),
    "address": Detector(lambda _regions: presidio.finder("address"), None, pseudonyms.address),
}
"""Name to detector, the most specific kind first."""


class Cleaned(NamedTuple):
    """A text after the filter, and what was found in the text before it."""

    text: str
    findings: list[Finding]


class PrivacyFilter:
    """Finds the ``kinds`` of personal data and does ``action`` to them. Safe to share by threads, picklable for processes.

    ``key`` is the secret of the pseudonyms, by default what ``LLMKIT_PSEUDONYM_KEY`` holds. ``regions`` are those whose
    phone numbers are known without a country code. Raises UsageError for a kind, action or region that is not known,
    MissingError for a missing package, model or key.
    """

    def __init__(
        self,
        kinds: Iterable[Kind] = DEFAULT_KINDS,
        action: Action = "report",
        *,
        key: bytes | None = None,
        regions: Sequence[str] = DEFAULT_REGIONS,
    ) -> None:
        wanted = set(kinds)
        if unknown := sorted(wanted - KINDS.keys()):
            raise UsageError(f"no such kind of personal data: {', '.join(unknown)}; there are {', '.join(KINDS)}")
        if action not in get_args(Action):
            raise UsageError(f"no such action: {action}; there are {', '.join(get_args(Action))}")
        self.kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind in wanted)
        self.action: Action = action
        self.regions = tuple(regions)
        self._key = key or (pseudonyms.key_from_environment() if action == "pseudonymize" else b"")
        self._finders = [(kind, KINDS[kind].hint, KINDS[kind].ready(self.regions)) for kind in self.kinds]
        self._hints = {hint for _, hint, _ in self._finders if hint}

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(PrivacyFilter, self.kinds, self.action, key=self._key, regions=self.regions), ()

    def __repr__(self) -> str:
        return f"PrivacyFilter({', '.join(self.kinds)}; {self.action})"

    def find(self, text: str) -> list[Finding]:
        """What is personal in ``text``, in order of place, without overlaps: the more specific kind, then the longer."""
        return [finding for finding, _ in self._matches(text)]

    def clean(self, text: str, document: str | int) -> str:
        """``text`` with its findings replaced; unchanged when the action is not ``redact`` or ``pseudonymize``.

        ``document`` is what pseudonyms are consistent in: the row's id, or one for all rows of a user.
        """
        return self.apply(text, document).text

    def apply(self, text: str, document: str | int) -> Cleaned:
        """:meth:`clean` and :meth:`find` in one pass."""
        matches = self._matches(text)
        findings = [finding for finding, _ in matches]
        if not matches or self.action not in ("redact", "pseudonymize"):
            return Cleaned(text, findings)
        parts = []
        done = 0
        for finding, canonical in matches:
            parts += [
                text[done : finding.start],
                self._stand_in(text[finding.start : finding.end], finding.kind, canonical, document),
            ]
            done = finding.end
        return Cleaned("".join(parts) + text[done:], findings)

    def audit(self) -> Audit:
        """An empty audit for what this filter looks for."""
        return Audit(self.action, self.kinds)

    def _stand_in(self, value: str, kind: Kind, canonical: str, document: str | int) -> str:
        if self.action == "redact":
            return f"<{kind.upper()}>"
        shape = normalize(value).text
        return KINDS[kind].pseudonym(shape, canonical, pseudonyms.Draw(self._key, document, kind, canonical))

    def _matches(self, text: str) -> list[tuple[Finding, str]]:
        """Findings and the canonical forms of their values."""
        view = normalize(text)
        windows: dict[Hint | None, list[tuple[int, int]]] = {hint: hint.windows(view.text) for hint in self._hints}
        windows[None] = [(0, len(view.text))]
        taken: list[tuple[Finding, str]] = []
        for kind, hint, find in self._finders:
            found = [(first, match) for first, last in windows[hint] for match in find(view.text[first:last])]
            for first, match in sorted(found, key=lambda pair: pair[1].start - pair[1].end):
                start, end = view.span(first + match.start, first + match.end)
                place = bisect_left(taken, start, key=lambda found: found[0].start)
                behind_ok = place == len(taken) or end <= taken[place][0].start
                if behind_ok and (place == 0 or taken[place - 1][0].end <= start):
                    taken.insert(place, (Finding(kind, start, end), match.canonical))
        return taken
