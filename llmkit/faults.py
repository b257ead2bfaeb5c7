"""What an exception means to the user: one of llmkit's own errors, or a bug whose traceback is kept in a file."""

from __future__ import annotations

import errno
import tempfile
import traceback
from pathlib import Path

from llmkit.errors import LlmkitError, MissingError, ProcessLostError, UsageError, WontFitError

EXIT_BUG = 1
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it: Ctrl-C twice, without waiting for a checkpoint."""

EXTRA_OF: dict[str, str] = {
    "accelerate": "train", "datasets": "train", "deepspeed": "train", "jsonschema": "train", "matplotlib": "train", "mlflow": "train",
    "numpy": "train", "pandas": "train", "peft": "train", "pyarrow": "train", "safetensors": "train",
    "tokenizers": "train", "torch": "train", "transformers": "train",
    "bitsandbytes": "quantize", "gguf": "demo", "kubernetes": "k8s", "ray": "ray", "s3fs": "s3", "fsspec": "s3",
    "vllm": "vllm", "presidio_analyzer": "presidio", "PIL": "image", "lance": "lance", "faiss": "faiss", "kubeflow": "k8s",
}  # fmt: skip
"""The extra of llmkit that brings a package, by the name it is imported under."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
_DISK_TEXT = ("no space left on device", "disk quota exceeded")
_MEMORY_TEXT = (
    "can't allocate memory",
    "cuda out of memory",
    "cannot allocate memory",
    "bad_alloc",
    "outofmemory",
    "memory allocation still failed",
)
_MEMORY_IMPORT_TEXT = "failed to map segment"
_GROUP_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_TEXT = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "remote process exited",
    "remote error", "ncclremoteerror", "recv() failed", "socket closed", "failed to recv", "connectfullmesh failed",
)  # fmt: skip
_LATE_TEXT = ("timed out", "timeout")


def translate(exc: BaseException, folder: Path | None = None) -> LlmkitError | None:
    """The llmkit error that ``exc`` amounts to, or None for a bug (or an interrupt).

    ``folder`` is the run's output folder: what cannot be written there is the recipe's ``output_dir`` at fault.
    """
    if isinstance(exc, LlmkitError):
        return exc
    if isinstance(exc, ImportError):
        return _missing_package(exc)
    if (lost := _lost_process(exc)) is not None:
        return lost
    if _disk_full(exc):
        return WontFitError(
            f"The disk is full{_at(exc) or (f' ({folder})' if folder is not None else '')}. Free some space (old runs, checkpoints and the token cache are the usual "
            "places) or give --output-dir on another disk, then run the same command again."
        )
    if _out_of_memory(exc):
        return WontFitError(
            f"Out of memory: {_first_line(exc)}\n"
            "Try train.per_device_train_batch_size=1 with a larger train.gradient_accumulation_steps, a smaller "
            "train.micro_batch_tokens or data.max_length, or train.gradient_checkpointing=true."
        )
    if isinstance(exc, OSError) and exc.errno in _FORBIDDEN and folder is not None and _inside(exc, folder):
        return UsageError(f"Cannot write to the output folder{_at(exc)}: {exc.strerror}. Give another --output-dir.")
    return None


def describe_bug(exc: BaseException, folder: Path | None = None) -> str:
    """One line for the user about an exception that nobody foresaw; the traceback goes to a file.

    The file is ``traceback.txt`` in ``folder`` where that can be written, else a temporary file. An exception that
    was described before keeps its file.
    """
    notes = [n for n in getattr(exc, "__notes__", []) if n.startswith(_NOTE)]
    if not notes:
        path = save_traceback(exc, folder)
        notes = [f"{_NOTE} {path}" if path else f"{_NOTE} nowhere (no folder could be written); see --debug"]
        exc.add_note(notes[0])
    return f"a bug in llmkit: {type(exc).__name__}: {_first_line(exc)}\n{notes[0]}\nPlease report it with that file."


_NOTE = "the full traceback is in"


def save_traceback(exc: BaseException, folder: Path | None) -> Path | None:
    text = "".join(traceback.format_exception(exc))
    places = [] if folder is None else [folder / "traceback.txt"]
    for path in places:
        try:
            path.write_text(text, encoding="utf-8")
        except OSError:
            continue
        return path
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="llmkit-traceback-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        return None
    return Path(file.name)


def _missing_package(exc: ImportError) -> LlmkitError | None:
    if _MEMORY_IMPORT_TEXT in str(exc):
        return WontFitError(f"Out of memory while the libraries were loaded: {_first_line(exc)}")
    package = (exc.name or "").partition(".")[0]
    extra = EXTRA_OF.get(package)
    if extra is None:
        return None
    if isinstance(exc, ModuleNotFoundError) and exc.name == package:
        return MissingError.extra(package, extra)
    return MissingError(
        f"{package} is installed but cannot be imported: {_first_line(exc)}\n"
        f"Install it again with: pip install --force-reinstall --no-deps {package}"
    )


def _lost_process(exc: BaseException) -> LlmkitError | None:
    """Gloo, NCCL and the store have errors of their own for a process that is gone, and for one that does not answer."""
    text = _first_line(exc)
    low = text.lower()
    ours = type(exc).__name__ in _GROUP_ERRORS or (isinstance(exc, RuntimeError) and "gloo" in low)
    if ours and any(t in low for t in _LATE_TEXT):
        return ProcessLostError(
            f"Another process of this run did not answer in time: {text}\n"
            "It hangs, or its part of the work takes longer than launch.timeout_minutes allows."
        )
    if ours and any(t in low for t in _LOST_TEXT):
        return ProcessLostError(
            f"Another process of this run is gone: {text}\n"
            "What it died of is in its own output; without any, it was probably killed, as when memory runs out."
        )
    return None


def tells_of_memory(text: str) -> bool:
    """Whether a library or the system says in ``text`` that there was not enough memory."""
    return any(t in text.lower() for t in _MEMORY_TEXT)


def _disk_full(exc: BaseException) -> bool:
    if isinstance(exc, OSError) and exc.errno in _FULL:
        return True
    # Rust libraries (safetensors, tokenizers) and Arrow raise classes of their own with the system's text.
    return isinstance(exc, Exception) and any(t in str(exc).lower() for t in _DISK_TEXT)


def _out_of_memory(exc: BaseException) -> bool:
    if isinstance(exc, MemoryError):
        return True
    kind = type(exc)
    if kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch"):
        return True
    if isinstance(exc, OSError) and exc.errno == errno.ENOMEM:
        return True
    return isinstance(exc, RuntimeError) and tells_of_memory(str(exc))


def _inside(exc: OSError, folder: Path) -> bool:
    if not isinstance(exc.filename, str | bytes):
        return False
    name = exc.filename if isinstance(exc.filename, str) else exc.filename.decode(errors="replace")
    path = Path(name).absolute()
    # Making the folder fails at a parent of it.
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def _at(exc: BaseException) -> str:
    name = getattr(exc, "filename", None)
    return f" ({name})" if isinstance(name, str) else ""


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
