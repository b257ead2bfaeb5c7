"""Finding secrets in text, so that none reaches a recipe, a job script, a log line or a tracked parameter."""

from __future__ import annotations

import re

_PATTERNS: dict[str, str] = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{16,}",
    "an API key": r"\b(?:sk-[A-Za-z0-9_-]{20,}|AIza[0-9A-Za-z_-]{30,}|nvapi-[A-Za-z0-9_-]{20,})",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URI": r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)",
    "a signed URI": (
        r"(?i)(?<=[?&])(?:x-amz-(?:signature|credential|security-token)|sig|token|access_token|api_key)=[^\s&]+"
    ),
}
_COMPILED = {what: re.compile(pattern) for what, pattern in _PATTERNS.items()}
_KEY = re.compile(
    r"(?i)(?:^|[_.-])(?:password|passwd|secret|credentials?|api_?key|(?:secret|access)_?key(?:_id)?|"
    r"(?:auth|access|hf|hub|session|bearer)_?token)$|^token$"
)


def find(text: str) -> str | None:
    """What kind of secret ``text`` holds, or None."""
    return next((what for what, pattern in _COMPILED.items() if pattern.search(text)), None)


def names_secret(key: str) -> bool:
    """Whether a key of this name usually holds a secret (``password``, ``api_key``, ``hf_token`` …)."""
    return bool(_KEY.search(key))


def mask(text: str) -> str:
    """``text`` with every secret in it replaced by ``***``."""
    for pattern in _COMPILED.values():
        text = pattern.sub("***", text)
    return text
