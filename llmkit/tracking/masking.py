"""Secrets out of everything that is recorded: params, tags, ``log.jsonl``, the command line.

Three rules, applied together: the values of environment variables whose name says they are secret, values under a key
whose name says so, and shapes that only secrets have (``llmkit.secrets`` knows them; what is added here only makes sense where text is
masked, not where it is refused: ``Bearer …``, ``password=…``, whole private keys, every user part of a URI).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmkit import secrets as recipe_secrets

HIDDEN = "***"

_ENV_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|KEY(?!BOARD|RING|S?_?(PATH|FILE|DIR)$)|CREDENTIAL", re.IGNORECASE
)
_HARMLESS = re.compile(r"true|false|none|null|auto|[\d.,:_-]+", re.IGNORECASE)
_SHORTEST_ENV_SECRET = 8

# `max_tokens`, `pad_token` and `key_columns` are no secrets, `hf_token` and `api_key` are.
_SECRET_KEY = re.compile(
    r"""(?ix) (?:^|[._\-\s/])
    (?: pass(?:word|wd|phrase)s? | pwd | secrets? | credentials? | apikey | authorization
      | (?:secret|private|access|api|account|encryption|signing|ssh|storage)[_\-]?key(?:[_\-]id)?
      | (?:(?:hf|hub|access|auth|api|bearer|refresh|session|security|github|gitlab|git|mlflow|wandb|user|id|bot|oauth|aws)
           [_\-])+ token
    )$"""
)
_BARE_TOKEN = re.compile(r"(?i)(?:^|[.\-/])token$")

_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
    (re.compile(r"(?<=://)[^\s/@'\"]+(?=@)"), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (
        re.compile(r"(?i)([?&](?:[\w-]*token|sig|signature|x-amz-[\w-]+|[\w-]*key|[\w-]*secret|password)=)[^&\s'\"]+"),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"(?i)(\b(?:password|passwd|secret|api[_-]?key|access[_-]?key|secret[_-]?key|(?:hf|hub|access|auth|api)[_-]token)"
            r"['\"]?\s*[=:]\s*['\"]?)(?!\*\*\*)[^\s'\",;&}]+"
        ),
        rf"\1{HIDDEN}",
    ),
)


def is_secret_key(key: str) -> bool:
    """Whether the value under ``key`` (a dotted path, an option, a variable) is to be hidden whatever it is."""
    return bool(_SECRET_KEY.search(key) or _BARE_TOKEN.search(key) or recipe_secrets.names_secret(key))


def environment_secrets(environ: Mapping[str, str] | None = None) -> list[str]:
    """Values of secret environment variables, longest first; paths, numbers and flags are left out."""
    found = set()
    for name, value in (os.environ if environ is None else environ).items():
        if not _ENV_NAME.search(name) or len(value) < _SHORTEST_ENV_SECRET or _HARMLESS.fullmatch(value):
            continue
        if _is_path(value):
            continue
        found.add(value)
    return sorted(found, key=len, reverse=True)


def _is_path(value: str) -> bool:
    try:
        return value.startswith(("/", "~", "./")) and Path(value).expanduser().exists()
    except (OSError, RuntimeError):  # too long for a path, or no such home
        return False


def mask(text: str, *, key: str = "", secrets: Sequence[str] | None = None) -> str:
    """``text`` with every secret replaced by ``***``; all of it when ``key`` names a secret.

    ``secrets`` defaults to those of the environment; pass them when masking many texts.
    """
    if not text:
        return text
    if key and is_secret_key(key):
        return HIDDEN
    for secret in environment_secrets() if secrets is None else secrets:
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _SHAPES:
        text = pattern.sub(replacement, text)
    return recipe_secrets.mask(text)


def mask_tree(value: object, *, key: str = "", secrets: Sequence[str] | None = None) -> object:
    """``mask`` for every string of a nested mapping or list; numbers, flags and None stay."""
    known = environment_secrets() if secrets is None else secrets
    if isinstance(value, str):
        return mask(value, key=key, secrets=known)
    if isinstance(value, Mapping):
        return {mask(str(k), secrets=known): mask_tree(v, key=str(k), secrets=known) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_tree(item, key=key, secrets=known) for item in value]
    return value


def mask_command(argv: Sequence[str]) -> str:
    """The command line as one string, quoted for a shell; ``--token X``, ``--token=X`` and ``a.password=X`` hidden."""
    secrets = environment_secrets()
    shown, hide_next = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        if hide_next:
            shown.append(HIDDEN)
            hide_next = False
        elif equals and is_secret_key(name.lstrip("-")):
            shown.append(f"{name}={HIDDEN}")
        else:
            hide_next = word.startswith("--") and is_secret_key(word.lstrip("-"))
            shown.append(mask(word, secrets=secrets))
    return " ".join(word if HIDDEN in word and " " not in word else shlex.quote(word) for word in shown)


def without_credentials(uri: str) -> str:
    """A URI that can be written down: user and password removed altogether, signed query strings hidden."""
    return mask(re.sub(r"(?<=://)[^\s/@]+@", "", uri))
