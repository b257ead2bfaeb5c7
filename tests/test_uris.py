"""Which URIs a run folder may have, and where its run works on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit import uris
from llmkit.errors import RecipeError
from llmkit.recipe import Recipe, parse


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://key:secret@bucket/runs/a", "credentials"),
        ("s3://key@bucket/runs/a", "credentials"),
        ("s3:///runs/a", "names no bucket"),
        ("s3://bucket", "a whole bucket"),
        ("s3://bucket/", "a whole bucket"),
        ("s3://bucket/../a", "`..`"),
        ("s3://bucket/a?versionId=1", "`?`"),
        ("S3 //x://", "no URI"),
        ("memory://", "a whole bucket"),
    ],
)
def test_a_uri_that_cannot_be_a_run_folder_is_refused_with_its_reason(uri: str, says: str) -> None:
    assert says in uris.mistake(uri)
    with pytest.raises(RecipeError) as caught:
        parse({"name": "x", "output_dir": uri}, Recipe)
    assert "output_dir" in str(caught.value) and "secret@" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://bucket/runs/a", "gs://b/a", "file:///tmp/x", "memory://a", "s3://bucket/a b/ü"])
def test_a_uri_of_a_folder_is_taken(uri: str) -> None:
    assert uris.mistake(uri) == ""
    assert parse({"name": "x", "output_dir": uri}, Recipe).output_dir == uri


def test_scratch_is_a_folder_of_this_machine() -> None:
    with pytest.raises(RecipeError, match="scratch_dir"):
        parse({"name": "x", "launch": {"scratch_dir": "s3://b/x"}}, Recipe)


def test_the_same_uri_has_the_same_scratch_folder_and_another_store_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMKIT_SCRATCH", str(tmp_path))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    first = uris.workplace("s3://bucket/runs/mine")
    assert first.parent == tmp_path and first.name.startswith("mine-")
    assert uris.workplace("s3://bucket/runs/mine/") == first
    assert uris.workplace("s3://other/runs/mine") != first
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert uris.workplace("s3://bucket/runs/mine") != first
    assert uris.workplace("s3://bucket/runs/mine", str(tmp_path / "there")).parent == tmp_path / "there"
    assert uris.workplace("runs/mine") == Path("runs/mine").absolute()
