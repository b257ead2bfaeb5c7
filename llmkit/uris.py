"""Run folders in an object store: which texts are URIs, what is wrong with one, and where its run works on this machine.

Light: nothing here speaks to a store (``llmkit.mirror`` does).
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from llmkit.files import cache_folder

_SHAPE = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]*)(.*)", re.DOTALL)
_WITHOUT_BUCKET = {"file", "local", "memory"}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def is_uri(path: str) -> bool:
    """An fsspec URI such as ``s3://bucket/runs/mine`` (``file://`` too)."""
    return "://" in path


def mistake(uri: str) -> str:
    """Why a URI cannot be a run's folder, ``""`` where it can."""
    found = _SHAPE.fullmatch(uri)
    if found is None:
        return "is no URI of the form protocol://bucket/folder"
    protocol, bucket, rest = found.groups()
    if "@" in bucket:
        return "holds credentials: they belong into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE)"
    if "?" in uri or "#" in uri:
        return "must not hold `?` or `#`"
    parts = [part for part in rest.split("/") if part]
    if any(part in (".", "..") for part in parts):
        return "must not hold `.` or `..` as a folder"
    if protocol not in _WITHOUT_BUCKET and not bucket:
        return f"names no bucket (expected {protocol}://bucket/folder)"
    if not parts and (protocol not in _WITHOUT_BUCKET or not bucket):
        return "is a whole bucket: name a folder in it"
    return ""


def joined(uri: str, name: str) -> str:
    return f"{uri.rstrip('/')}/{name}"


def recipe_of(output_dir: str, folder: Path) -> str:
    """Where the frozen recipe of a run is: what ``llmkit run`` is given. ``folder`` is the run's ``workplace``."""
    return joined(output_dir, "recipe.yaml") if is_uri(output_dir) else str(folder / "recipe.yaml")


def workplace(output_dir: str, scratch_dir: str | None = None) -> Path:
    """The folder on this machine in which a run of ``output_dir`` works: the folder itself, or for a URI its scratch folder.

    The scratch folder lies in ``scratch_dir``, else in ``LLMKIT_SCRATCH``, else among llmkit's caches; its name
    comes from the URI and the endpoint, so that the same command finds it again.
    """
    if not is_uri(output_dir):
        return Path(output_dir).expanduser().absolute()
    uri = output_dir.rstrip("/")
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "") if _is_s3(uri) else ""
    digest = hashlib.sha256(f"{uri}\n{endpoint}".encode()).hexdigest()[:12]
    base = scratch_dir or os.environ.get("LLMKIT_SCRATCH")
    folder = Path(base).expanduser() if base else cache_folder() / "scratch"
    return folder.absolute() / f"{uri.rpartition('/')[2]}-{digest}"


def _is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))
