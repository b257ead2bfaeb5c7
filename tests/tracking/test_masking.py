"""Field lesson 34: secrets never reach what is recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.tracking.masking import (
    environment_secrets,
    is_secret_key,
    mask,
    mask_command,
    mask_tree,
    without_credentials,
)

HF = "hf_" + "abcdEFGH" * 4


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"login {HF} now", "login *** now"),
        ("postgres://bob:pw12@db/x", "postgres://***@db/x"),
        ("https://ghp_tokenvalue@github.com/a/b", "https://***@github.com/a/b"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("password=hunter2, user=bob", "password=***, user=bob"),
        ('{"api_key": "k-123"}', '{"api_key": "***"}'),
        ("AKIA" + "A" * 16, "***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, left: str) -> None:
    assert mask(text, secrets=[]) == left


def test_a_signed_uri_keeps_its_path() -> None:
    masked = mask("https://b.s3.amazonaws.com/rows.jsonl?X-Amz-Signature=abcdef&part=1", secrets=[])
    assert "abcdef" not in masked and masked.startswith("https://b.s3.amazonaws.com/rows.jsonl?")


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=5",
        "user@example.com",
        "s3://bucket/a@b/rows.jsonl",
        "tokens: 4096",
        "the secret garden",
        "task-token",
    ],
)
def test_plain_text_stays(text: str) -> None:
    assert mask(text, secrets=[]) == text


@pytest.mark.parametrize(
    "key", ["hf_token", "a.b.password", "api_key", "token", "AWS_SECRET_ACCESS_KEY", "--access-token"]
)
def test_secret_keys(key: str) -> None:
    assert is_secret_key(key.lstrip("-"))


@pytest.mark.parametrize(
    "key", ["max_new_tokens", "pad_token", "eos_token", "tokens_per_second", "columns.key", "tokenizer"]
)
def test_keys_that_only_sound_secret(key: str) -> None:
    assert not is_secret_key(key)


def test_values_of_secret_environment_variables(tmp_path: Path) -> None:
    environ = {
        "MY_SERVICE_TOKEN": "abcdefgh1234",
        "DB_PASSWORD": "short",
        "TOKENIZERS_PARALLELISM": "falsefalse",
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path),
        "SOME_KEY": "true",
        "PORT_KEY": "1234567890",
        "HOME": "/home/someone",
    }
    assert environment_secrets(environ) == ["abcdefgh1234"]
    assert mask("x=abcdefgh1234!", secrets=environment_secrets(environ)) == "x=***!"


def test_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_SECRET", "swordfish-99")
    assert mask("say swordfish-99") == "say ***"


def test_trees_keep_their_shape() -> None:
    tree = {
        "hf_token": "abc",
        "n": 3,
        "none": None,
        "deep": [{"password": "x", "uri": "s3://u:p@h"}],
        "max_tokens": "5",
    }
    masked = {
        "hf_token": "***",
        "n": 3,
        "none": None,
        "deep": [{"password": "***", "uri": "s3://***@h"}],
        "max_tokens": "5",
    }
    assert mask_tree(tree) == masked


def test_command_lines() -> None:
    argv = ["llmkit", "sft", "a b.yaml", "--token", "abc", "--api-key=xyz", "x.password=p", "train.max_steps=3", HF]
    assert mask_command(argv) == "llmkit sft 'a b.yaml' --token *** --api-key=*** x.password=*** train.max_steps=3 ***"


def test_uris_lose_their_credentials() -> None:
    assert without_credentials("https://u:p@host:5000/x") == "https://host:5000/x"
    assert without_credentials("sqlite:////a/b.db") == "sqlite:////a/b.db"
