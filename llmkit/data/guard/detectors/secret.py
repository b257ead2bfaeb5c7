"""Keys, tokens and passwords that open something: by the prefixes their makers give them, else by a word beside them.

Sources: the token formats that AWS, GitHub, GitLab, Slack, OpenAI, Anthropic, Hugging Face, Google, Stripe, npm, PyPI and
others document for secret scanning; RFC 7519 for JSON web tokens; RFC 7468 for key blocks.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from llmkit.data.guard.detectors import labels
from llmkit.data.guard.detectors.base import Match

_FORMATS = (
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}",  # AWS
    r"gh[pousr]_[A-Za-z0-9]{36,251}",  # GitHub
    r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    r"gl(?:pat|dt|rt|ft|soat|cbt|ptt|oas)-[A-Za-z0-9_\-.]{20,}",  # GitLab
    r"xox[abeoprs]-[A-Za-z0-9\-]{10,}",  # Slack
    r"xapp-[0-9]-[A-Z0-9]+-[0-9]+-[a-z0-9]{32,}",
    r"sk-(?:proj|svcacct|admin|None)-[A-Za-z0-9_\-]{20,}",  # OpenAI
    r"sk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}",
    r"sk-ant-[a-z0-9]{2,8}-[A-Za-z0-9_\-]{24,}",  # Anthropic
    r"sk-or-v1-[0-9a-f]{64}",  # OpenRouter
    r"sk-(?=[a-z]*[A-Z0-9])(?=[A-Za-z]*[0-9])[A-Za-z0-9]{32,64}",  # OpenAI's first ones, DeepSeek and others
    r"(?:hf|api_org)_[A-Za-z0-9]{30,40}",  # Hugging Face
    r"AIza[0-9A-Za-z_\-]{35}",  # Google
    r"ya29\.[0-9A-Za-z_\-]{20,}",
    r"GOCSPX-[0-9A-Za-z_\-]{28}",
    r"[rsp]k_(?:live|test)_[0-9A-Za-z]{16,}",  # Stripe
    r"whsec_[0-9A-Za-z]{24,}",
    r"SG\.[0-9A-Za-z_\-]{16,32}\.[0-9A-Za-z_\-]{16,64}",  # SendGrid
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-AgE[A-Za-z0-9_\-]{50,}",
    r"do[opr]_v1_[a-f0-9]{64}",  # DigitalOcean
    r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}",  # Shopify
    r"dapi[a-f0-9]{32}(?:-[0-9])?",  # Databricks
    r"nvapi-[A-Za-z0-9_\-]{40,}",  # NVIDIA
    r"gsk_[A-Za-z0-9]{40,}",  # Groq
    r"xai-[A-Za-z0-9]{40,}",
    r"r8_[A-Za-z0-9]{37}",  # Replicate
    r"key-[0-9a-f]{32}",  # Mailgun
    r"SK[0-9a-f]{32}",  # Twilio
    r"ATATT3[A-Za-z0-9_\-=]{100,}",  # Atlassian
    r"lin_api_[A-Za-z0-9]{40}",
    r"ntn_[0-9]{11}[A-Za-z0-9]{35}",  # Notion
    r"figd_[A-Za-z0-9_\-]{40}",
    r"dckr_pat_[A-Za-z0-9_\-]{27}",
    r"hvs\.[A-Za-z0-9_\-]{24,}",  # HashiCorp Vault
    r"AGE-SECRET-KEY-1[02-9AC-HJ-NP-Z]{58}",
    r"[0-9]{8,10}:AA[A-Za-z0-9_\-]{33}",  # Telegram bots
    r"(?P<jwt>eyJ[A-Za-z0-9_\-]{8,}\.eyJ[A-Za-z0-9_\-]{4,}\.[A-Za-z0-9_\-]{8,})",
)
_KNOWN = re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(_FORMATS)})(?![A-Za-z0-9_])")
_KEY_BLOCK = re.compile(
    r"-----BEGIN (?P<what>[A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:[A-Za-z0-9+/=\s\\:,.\"']|-(?!----)){32,20000}?(?:-----END (?P=what)-----|(?<=[A-Za-z0-9+/=\s\\]{32})\Z)"
)
_USERINFO = re.compile(
    r"[A-Za-z][A-Za-z0-9+.\-]{1,20}://[^\s/@:\"'<>]{0,80}:(?P<password>[^\s/@\"'<>]{3,120})@"
    r"(?!localhost|127\.|host|server|(?:[A-Za-z0-9\-]+\.)*example\b)[A-Za-z0-9.\-\[]"
)
_SHORTEST = 16
_RUN = re.compile(r"[A-Za-z0-9_+/.=:\-]{16,}")
_TOKEN = re.compile(r"(?<![A-Za-z0-9_+/.\-])[A-Za-z0-9_+/.\-]{16,200}={0,2}(?![A-Za-z0-9_+/.\-=])")
# Between the word and the value: signs, or a few words up to "is".
_ASSIGNED = re.compile(r"[^A-Za-z0-9,|!(\n]{0,8}(?:(?:[A-Za-z]{1,12} ){0,4}(?:is|was)\b)?[^A-Za-z0-9,|!(\n]{0,6}")
_PLACEHOLDER = re.compile(
    r"(?i)example|sample|placeholder|change[-_]?me|your[-_]|dummy|redacted|insert[-_]|replace|xxxx|\*\*\*|\.\.\.|0000000|1234567890"
)
_LETTERS = re.compile(r"[A-Z][a-z]{3,}|[a-z]{4,}|[A-Z]{4,}")
_VOWEL = re.compile(r"(?i)[aeiou]")
# Share of a value in what could be words. Of the names with a digit in Python's packages 86 in 100 are above it, of
# random strings of 24 letters and digits 2 in 100.
_MOST_WORDS = 0.5
_DOTTED_NAME = re.compile(r"\.?[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_MIN_BITS = 3.0  # entropy a character


def find(text: str) -> Iterator[Match]:
    """Known formats, private key blocks, passwords in URIs, and random-looking strings beside a word for secret."""
    if "PRIVATE KEY" in text:
        yield from (Match(*block.span(), block[0]) for block in _KEY_BLOCK.finditer(text))
    if "://" in text and "@" in text:
        for match in _USERINFO.finditer(text):
            if not _is_variable(match["password"]):
                yield Match(*match.span("password"), match["password"])
    if text.isascii() and len(max(text.split(), key=len, default="")) < _SHORTEST:
        return  # nothing here is as long as a key
    for run in _RUN.finditer(text):
        yield from _in_run(text, *run.span())


def _in_run(text: str, start: int, end: int) -> Iterator[Match]:
    """Keys in a run of characters that keys are made of."""
    for match in _KNOWN.finditer(text, start, end):
        if not _is_published(match[0]) and (match["jwt"] is None or _is_jwt(match[0])):
            yield Match(*match.span(), match[0])
    for match in _TOKEN.finditer(text, start, end):
        called = text[match.end() : match.end() + 1] in ("(", "[")
        if not called and _is_random(match[0]) and labels.before(text, match.start(), _ASSIGNED) == "secret":
            yield Match(*match.span(), match[0])


def _is_published(token: str) -> bool:
    """AWS and others print keys that end so in their documentation."""
    return token.endswith("EXAMPLE")


def _is_jwt(token: str) -> bool:
    header = token.split(".", 1)[0]
    try:
        return "alg" in json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (binascii.Error, ValueError):
        return False


def _is_variable(value: str) -> bool:
    """``$PASSWORD``, ``{password}``, ``****``: the place of a password, not one."""
    return bool(
        re.fullmatch(r"\$.*|\{.*\}|%\(?\w*\)?s?|\*+|x+|\.+|REDACTED\w*|(?i:pass(?:word)?|pw|secret|token)", value)
    )


def _is_random(value: str) -> bool:
    """Digits and letters mixed as a generator mixes them: no words, paths, placeholders, names of a program."""
    letters = sum(char.isalpha() for char in value)
    digits = sum(char.isdigit() for char in value)
    mixed = digits > 0 and value.lower() != value != value.upper()
    if (
        letters < 3
        or sum(len(word) for word in _LETTERS.findall(value) if _VOWEL.search(word)) > _MOST_WORDS * len(value)
        or _DOTTED_NAME.fullmatch(value)
        or (digits < 2 and not mixed)
        or value.count("/") > 3
        or value.count(".") > 2
        or _PLACEHOLDER.search(value)
    ):
        return False
    return entropy(value) >= _MIN_BITS


def entropy(value: str) -> float:
    """Shannon entropy of the characters of ``value``, in bits a character."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
