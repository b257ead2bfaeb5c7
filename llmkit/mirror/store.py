"""One folder of an object store, through fsspec: names in, bytes out, and one kind of error."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from llmkit.errors import MissingError, StoreError, UsageError

T = TypeVar("T")

S3 = ("s3", "s3a")
WHOLE = {*S3, "gs", "gcs", "abfs", "abfss", "az", "memory"}
"""Protocols whose objects appear whole or not at all. Elsewhere a file is written under another name and renamed."""

PATIENCE_S = 10.0
"""How long one request is tried again while the store does not answer, unless told otherwise."""

_TAKEN = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_HOPELESS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "InvalidBucketName", "AccessDenied",
    "Forbidden", "403", "401", "ExpiredToken", "InvalidToken", "NoSuchBucket",
}  # fmt: skip
_HOPELESS_TYPES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}


class Store:
    """The folder ``uri``. Names are relative to it, with ``/``. Every method raises ``StoreError`` where the store is
    away or refuses; what may pass is tried again for ``patience_s`` seconds."""

    def __init__(self, uri: str, patience_s: float | None = None) -> None:
        self.uri = uri.rstrip("/")
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self._protocol = uri.split("://")[0]
        self._fs, root = _open(self.uri, self._protocol)
        self._root = root.rstrip("/")

    def check(self) -> None:
        """StoreError where the bucket does not exist: some servers would make it with the first write."""
        if self._protocol in S3:
            bucket, _, prefix = self._root.partition("/")
            self._ask(lambda: self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1))

    def sizes(self, under: str = "") -> dict[str, int]:
        """All objects below the folder, or below ``under`` in it, and their sizes in bytes."""
        top = self._path(under) if under else self._root
        found: dict[str, Any] = self._ask(lambda: self._fs.find(top, detail=True))
        start = len(self._root) + 1
        return {path[start:]: int(info["size"] or 0) for path, info in found.items() if info["type"] == "file"}

    def read(self, name: str) -> bytes | None:
        """None where there is no such object."""
        return self._ask(lambda: _or_none(lambda: bytes(self._fs.cat_file(self._path(name)))))

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """Those of them that exist."""
        wanted = {self._path(name): name for name in names}

        def cat() -> dict[str, bytes]:
            found: dict[str, Any] = self._fs.cat(list(wanted), on_error="return") if wanted else {}
            for value in found.values():
                if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                    raise value
            return {wanted[path]: value for path, value in found.items() if not isinstance(value, Exception)}

        return self._ask(cat)

    def version(self, name: str) -> str | None:
        """The ETag of an object, where the store can make a write depend on it."""
        if self._protocol not in S3:
            return None
        info = self._ask(lambda: _or_none(lambda: self._fs.info(self._path(name))))
        return None if info is None else info.get("ETag")

    def write(self, name: str, data: bytes) -> None:
        """The object holds ``data``, or still what it held before."""
        self._ask(lambda: self._put(self._path(name), lambda path: self._fs.pipe_file(path, data)))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that must not exist yet; False where it does, as far as the store keeps to it."""
        path = self._path(name)
        self._make_parent(path)
        return self._ask(lambda: _unless_taken(lambda: self._fs.pipe_file(path, data, mode="create")))

    def replace(self, name: str, data: bytes, version: str | None) -> bool:
        """Write an object that must still be of this version; False where it is not. Without one it is just written."""
        if version is None:
            self.write(name, data)
            return True
        path = self._path(name)
        return self._ask(lambda: _unless_taken(lambda: self._fs.pipe_file(path, data, IfMatch=version)))

    def upload(self, local: Path, name: str) -> None:
        self._ask(lambda: self._put(self._path(name), lambda path: self._fs.put_file(str(local), path)))

    def download(self, name: str, local: Path) -> bool:
        """False where there is no such object; ``local`` is overwritten."""
        return self._ask(lambda: _or_none(lambda: self._get(name, local))) is not None

    def copy(self, name: str, target: Store) -> None:
        """The same object in another folder of the same store, which does it by itself where it can."""
        source = self._path(name)
        self._ask(lambda: self._put(target._path(name), lambda path: self._fs.cp_file(source, path)))

    def delete(self, names: Iterable[str]) -> None:
        for path in map(self._path, names):
            self._ask(lambda path=path: _or_none(lambda: self._fs.rm_file(path)))  # type: ignore[misc]

    def beside(self, ending: str) -> Store:
        """The folder of the same name with ``ending``."""
        return Store(self.uri + ending, self.patience_s)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _get(self, name: str, local: Path) -> bool:
        self._fs.get_file(self._path(name), str(local))
        return True

    def _put(self, path: str, write: Callable[[str], object]) -> None:
        if self._protocol in WHOLE:
            write(path)
            return
        self._make_parent(path)
        folder, _, name = path.rpartition("/")
        unfinished = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.partial"
        write(unfinished)
        self._fs.mv(unfinished, path)

    def _make_parent(self, path: str) -> None:
        if self._protocol not in WHOLE:  # s3fs would make a bucket
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _ask(self, call: Callable[[], T]) -> T:
        """Do it, again and again while the store is away."""
        end, pause = time.monotonic() + self.patience_s, 0.5
        while True:
            try:
                return call()
            except Exception as exc:  # every store has exceptions of its own
                passing = _may_pass(exc)
                if not passing or time.monotonic() + pause > end:
                    raise StoreError(_message(self.uri, exc, passing=passing), passing=passing) from exc
            time.sleep(pause)
            pause = min(pause * 2, 8.0)


def _open(uri: str, protocol: str) -> tuple[Any, str]:
    """The file system and the path in it. An instance of our own: it is used by threads, and never by a forked child."""
    try:
        import fsspec
    except ImportError:
        raise MissingError.extra("fsspec", "s3") from None
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in S3:  # a second try at once; all further ones are ours
        options["config_kwargs"] = {"retries": {"mode": "standard", "max_attempts": 2}, "connect_timeout": 10}
    try:
        fs, path = fsspec.core.url_to_fs(uri, **options)
        if protocol in S3:
            fs.retries = 2
    except ImportError as exc:
        if protocol in S3:
            raise MissingError.extra("s3fs", "s3") from None
        raise MissingError(f"{uri}: the package for {protocol}:// is not installed. {exc}") from None
    except ValueError as exc:
        raise UsageError(f"{uri}: {exc}") from None
    return fs, str(path)


def _or_none(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except FileNotFoundError:
        return None


def _unless_taken(write: Callable[[], object]) -> bool:
    try:
        write()
    except Exception as exc:  # every store has exceptions of its own
        if isinstance(exc, FileExistsError) or _code(exc) in _TAKEN:
            return False
        raise
    return True


def _code(exc: BaseException) -> str:
    """The error code that an S3 store answered with."""
    for error in (exc, exc.__cause__):
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _may_pass(exc: BaseException) -> bool:
    if isinstance(exc, PermissionError | FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return False
    return _code(exc) not in _HOPELESS and type(exc).__name__ not in _HOPELESS_TYPES


def _message(uri: str, exc: BaseException, *, passing: bool) -> str:
    reason = " ".join(str(exc).split())[:300] or type(exc).__name__
    if isinstance(exc, FileNotFoundError):
        return f"{uri}: the bucket or folder does not exist ({reason})."
    advice = (
        ""
        if passing
        else "\nCredentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, …), the store's address from AWS_ENDPOINT_URL."
    )
    what = "does not answer" if passing else "refuses"
    return f"The store of {uri} {what}: {reason}{advice if uri.startswith(tuple(f'{p}://' for p in S3)) else ''}"
