"""Personal data in text: find it, and replace it by placeholders or pseudonyms.

::

    guard = PrivacyFilter(DEFAULT_KINDS, "redact")
    guard.find("mail kim@corp.co.kr")                  # [Finding("email", 5, 19)]
    guard.clean("mail kim@corp.co.kr", document=1)     # "mail <EMAIL>"

What is found, what is not and why: docs/privacy.md. How well: benchmarks/guard.py.
"""

from __future__ import annotations

import re
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


class Detector(NamedTuple):
    """A kind of personal data. ``ready`` makes its finder for some phone regions (others ignore them).

    ``hint`` is what a text must have for the finder to be worth running: an ``at`` sign, ``digits`` (seven close
    together, or an address), a ``token`` (sixteen characters without a space) or anything at all.
    """

    ready: Callable[[Sequence[str]], Finder]
    hints: tuple[str, ...]
    pseudonym: Callable[[str, str, pseudonyms.Draw], str]


def _plain(find: Finder) -> Callable[[Sequence[str]], Finder]:
    return lambda _regions: find


KINDS: dict[Kind, Detector] = {
    "secret": Detector(_plain(secret.find), ("token", "at"), pseudonyms.secret),
    "iban": Detector(_plain(iban.find), ("digits", "token"), pseudonyms.iban),
    "cn_id": Detector(_plain(national.find_cn_id), ("digits",), pseudonyms.cn_id),
    "card": Detector(_plain(card.find), ("digits",), pseudonyms.card),
    "kr_rrn": Detector(_plain(national.find_kr_rrn), ("digits",), pseudonyms.kr_rrn),
    "tw_id": Detector(_plain(national.find_tw_id), ("digits",), pseudonyms.tw_id),
    "us_ssn": Detector(_plain(national.find_us_ssn), ("digits",), pseudonyms.us_ssn),
    "email": Detector(_plain(email.find), ("at",), pseudonyms.email),
    "ip": Detector(_plain(ip.find), ("digits",), pseudonyms.ip),
    "phone": Detector(phone.finder, ("digits",), pseudonyms.phone),
    "name": Detector(lambda _regions: presidio.finder("name"), ("any",), pseudonyms.name),
    "address": Detector(lambda _regions: presidio.finder("address"), ("any",), pseudonyms.address),
}
"""Name to detector, the most specific kind first."""

# One pass each over a text decides which finders run; most rows of most data sets need none.
_HINTS: dict[str, Callable[[str], object]] = {
    "at": re.compile(r"@|골뱅이|[(\[{<]\s?(?:at|AT)\s?[)\]}>]").search,
    "digits": re.compile(
        r"[0-9](?:(?:[^0-9\n]{0,3}[0-9]){6}|[0-9]{0,2}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]|[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2})"
    ).search,
    "token": re.compile(r"[A-Za-z0-9_+/.=\-]{16}|PRIVATE KEY").search,
    "any": bool,
}


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
        self._finders = [(kind, KINDS[kind].hints, KINDS[kind].ready(self.regions)) for kind in self.kinds]
        self._hints = sorted({hint for kind in self.kinds for hint in KINDS[kind].hints})

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
        hints = {hint for hint in self._hints if _HINTS[hint](view.text)}
        if not hints:
            return []
        taken: list[tuple[Finding, str]] = []
        for kind, needs, find in self._finders:
            if hints.isdisjoint(needs):
                continue
            for match in sorted(find(view.text), key=lambda match: match.start - match.end):
                start, end = view.span(match.start, match.end)
                if all(end <= other.start or start >= other.end for other, _ in taken):
                    taken.append((Finding(kind, start, end), match.canonical))
        return sorted(taken, key=lambda found: found[0].start)
