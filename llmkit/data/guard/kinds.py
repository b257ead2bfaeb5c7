"""The names that settings, audit files and reports use for personal data and what can be done with it. No regex is compiled here."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal[
    "secret", "iban", "cn_id", "card", "kr_rrn", "tw_id", "us_ssn", "email", "ip", "phone", "name", "address"
]  # fmt: skip
"""Kinds of personal data, the most specific first: where two findings overlap, the earlier kind wins."""

Action = Literal["report", "redact", "pseudonymize", "drop", "error"]

DEFAULT_KINDS: tuple[Kind, ...] = (
    "secret", "iban", "cn_id", "card", "kr_rrn", "tw_id", "us_ssn", "email", "ip", "phone"
)  # fmt: skip
"""Every kind that needs no model. ``name`` and ``address`` need the extra ``presidio`` and a spaCy model."""

DEFAULT_REGIONS: tuple[str, ...] = ("KR", "CN", "TW", "JP", "US")
"""Regions (ISO 3166) whose phone numbers are known without a country code; ``+…`` numbers are known for all."""

KEY_VARIABLE = "LLMKIT_PSEUDONYM_KEY"


class Finding(NamedTuple):
    """Where in a text something personal is: ``text[start:end]``. It never holds the value."""

    kind: Kind
    start: int
    end: int
