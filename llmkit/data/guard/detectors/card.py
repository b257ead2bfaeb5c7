"""Payment card numbers: issuer prefix, length (ISO/IEC 7812) and Luhn check digit."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmkit.data.guard.detectors import labels
from llmkit.data.guard.detectors.base import Match

# What stands before or after must not make it part of a longer number, word or decimal.
_CANDIDATE = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9][.\-])"
    r"(?:[0-9]{12,19}"
    r"|[0-9]{4}(?P<by>[ \-])[0-9]{4}(?P=by)[0-9]{4}(?P=by)[0-9]{1,4}(?P<tail>(?P=by)[0-9]{1,3})?"  # 4-4-4-4(-3), 4-4-4-1
    r"|[0-9]{4}(?P<by2>[ \-])[0-9]{6}(?P=by2)[0-9]{4,5}"  # American Express, Diners
    r"|[0-9]{6}[ \-](?:[0-9]{13}|[0-9]{10}))"  # UnionPay
    r"(?![0-9A-Za-z_]|[.\-][0-9])"
)
# (first prefix, last prefix, lengths), the ranges that the networks publish.
_ISSUERS: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (4, 4, (13, 16, 19)),  # Visa
    (51, 55, (16,)),  # Mastercard
    (2221, 2720, (16,)),
    (34, 34, (15,)),  # American Express
    (37, 37, (15,)),
    (300, 305, (14,)),  # Diners Club
    (3095, 3095, (14,)),
    (36, 36, (14,)),
    (38, 39, (14,)),
    (6011, 6011, (16, 19)),  # Discover
    (644, 649, (16, 19)),
    (65, 65, (16, 19)),
    (3528, 3589, (16, 17, 18, 19)),  # JCB
    (62, 62, (16, 17, 18, 19)),  # UnionPay
    (81, 81, (16, 17, 18, 19)),
    (60, 60, (16,)),  # RuPay
    (508, 508, (16,)),
    (2200, 2204, (16, 17, 18, 19)),  # Mir
    (9792, 9792, (16,)),  # Troy
    (94, 94, (16,)),  # Korean domestic cards
    (50, 50, (12, 13, 14, 15, 16, 17, 18, 19)),  # Maestro
    (56, 58, (12, 13, 14, 15, 16, 17, 18, 19)),
    (6304, 6304, (12, 13, 14, 15, 16, 17, 18, 19)),
    (6759, 6759, (12, 13, 14, 15, 16, 17, 18, 19)),
    (676770, 676774, (12, 13, 14, 15, 16, 17, 18, 19)),
)


def find(text: str) -> Iterator[Match]:
    """Numbers of a known issuer with a right check digit, and no label that says they are something else.

    Bare numbers of unusual lengths must stand beside a word for card: 12 to 14 digits are barcodes (GTIN), 17 to 19 order
    numbers, and one in ten of them passes Luhn.
    """
    for match in _CANDIDATE.finditer(text):
        end = match.end()
        if match["tail"] and match["by"] == " " and not is_card(_digits(match[0])):
            end = match.start("tail")  # a number of its own that follows, "4111 1111 1111 1111 12"
        digits = _digits(text[match.start() : end])
        if (
            not is_card(digits)
            or labels.in_longer_run(text, match.start(), end)
            or labels.in_arithmetic(text, match.start(), end)
        ):
            continue
        label = labels.of(text, match.start(), end)
        grouped = len(digits) != end - match.start()
        if label == "card" or (label != "other" and (grouped or _usual(digits))):
            yield Match(match.start(), end, digits)


def _usual(digits: str) -> bool:
    """Whether a bare number is as long as nearly all cards are: 15, 16, and 19 for China's debit cards."""
    return len(digits) in (15, 16) or (len(digits) == 19 and digits.startswith("62"))


def _digits(text: str) -> str:
    return text.replace(" ", "").replace("-", "")


def is_card(digits: str) -> bool:
    """Whether issuer, length and check digit are those of a card."""
    return has_issuer(digits) and luhn(digits)


def has_issuer(digits: str) -> bool:
    """Whether a card network issues numbers of this prefix and length."""
    return any(
        first <= int(digits[: len(str(first))]) <= last and len(digits) in lengths for first, last, lengths in _ISSUERS
    )


def luhn(digits: str) -> bool:
    """The check of ISO/IEC 7812-1 annex B: every second digit from the right doubled, digit sums, divisible by ten."""
    total = sum(int(digit) for digit in digits[-1::-2])
    return (total + sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])) % 10 == 0
