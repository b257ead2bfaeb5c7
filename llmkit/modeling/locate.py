"""Find a model's folder and say what is wrong with it, before torch is asked to read it. Imports nothing heavy."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import socket
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmkit.errors import MissingError, UsageError
from llmkit.modeling.settings import ModelSettings, QuantizationSettings

BASE_FILE = "llmkit_base.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_HEADER = 100 * 1024 * 1024
_CHUNK = 8 * 1024 * 1024


@dataclass(frozen=True)
class BaseInfo:
    """The model that an adapter was trained on, as ``llmkit_base.json`` beside the adapter holds it.

    ``name_or_path`` is what the recipe said, ``path`` the absolute folder (the hub id for a hub model), ``digest``
    what :func:`model_digest` gave, ``rows`` the rows of the embedding in that folder, ``dtype`` the training type,
    ``quantization`` how its weights were quantized in training (the fields of QuantizationSettings), None for not at all.
    """

    name_or_path: str
    path: str
    digest: str
    rows: int
    dtype: str
    revision: str | None = None
    quantization: dict[str, Any] | None = None

    @property
    def quantized(self) -> QuantizationSettings | None:
        return None if self.quantization is None else QuantizationSettings(**self.quantization)

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / BASE_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> BaseInfo | None:
        """None for an adapter that another tool wrote. Raises MissingError for a damaged file."""
        path = folder / BASE_FILE
        if not path.is_file():
            return None
        try:
            info = cls(**json.loads(path.read_text(encoding="utf-8")))
            _ = info.quantized  # refused here, where the file can be named
            return info
        except (ValueError, TypeError) as error:
            raise MissingError(f"{path} is damaged ({error}): the adapter's base is not known") from error


def find_folder(name_or_path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Local folder of a model or tokenizer: the folder itself, or the hub cache's snapshot, fetched where it is not there.

    ``weights=False`` fetches a hub model's configuration and tokenizer only. Raises MissingError when there is neither
    a folder nor a reachable hub model of that name.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise MissingError(f"{name_or_path} is a file; a model is a folder with a config.json: name {path.parent}")
    if not _may_be_hub_id(name_or_path):
        raise MissingError(f"There is no folder {name_or_path}.{_near_names(path)}")
    return _from_hub(name_or_path, revision, weights)


def weights_folder(path: str | Path) -> Path:
    """The folder to answer with: of a run its model, its adapter or its merged model; a model's or adapter's own.

    Raises MissingError for a run that has not finished, and for a folder that is neither.
    """
    folder = find_folder(str(path))
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    for name, mark in (("model", "config.json"), ("adapter", "adapter_config.json"), ("merged", "config.json")):
        if (folder / name / mark).is_file():
            return folder / name
    if (folder / "recipe.yaml").is_file():
        raise MissingError(
            f"The run {folder} has no model/ or adapter/ yet: it has not finished. Run it again to its end"
        )
    raise MissingError(f"{folder} is neither a run nor a model: it has no model/, adapter/ or config.json")


def fingerprint(folder: Path) -> str:
    """What a model's folder holds, told quickly: small files by content, large ones by size and time of change."""
    whole = hashlib.sha256()
    for file in sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith(".")):
        status = file.stat()
        whole.update(f"{file.name} {status.st_size}".encode())
        whole.update(file.read_bytes() if status.st_size < _CHUNK else str(status.st_mtime_ns).encode())
    return f"sha256:{whole.hexdigest()}"


def check_folder(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """The folder's ``config.json``, once the folder is known to be complete.

    Raises MissingError naming the file: no or a broken config.json, no weights, a missing shard, a truncated or
    corrupted safetensors file.
    """
    config = _read_config(folder)
    if weights:
        files = weight_files(folder)
        for file in files:
            if file.suffix == ".safetensors":
                check_safetensors(file)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in the order in which transformers would choose them; shards sorted by name."""
    for name in _WEIGHTS:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return [file]
        return _shards(file)
    raise MissingError(f"{folder} has a config.json but no weights: one of {', '.join(_WEIGHTS)} is needed there")


def check_safetensors(file: Path) -> None:
    """Hold the header of a safetensors file against its length.

    The format: 8 bytes little-endian header length, JSON header with each tensor's ``data_offsets``, then the data
    (https://github.com/huggingface/safetensors). Raises MissingError for a file that is cut or overwritten.
    """
    size = file.stat().st_size
    damaged = f"{file} is damaged: {{}}. Fetch or copy it again"
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise MissingError(damaged.format(f"it has {size} bytes"))
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_MAX_HEADER, size):
            raise MissingError(damaged.format("it does not begin with a safetensors header"))
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise MissingError(damaged.format("its header cannot be read")) from error
    wanted = 8 + length + max(ends, default=0)
    if wanted != size:
        raise MissingError(damaged.format(f"it should have {wanted:,} bytes and has {size:,}"))


def model_digest(path: str | Path) -> str:
    """SHA-256 over ``config.json`` and every weight file (names and content) of a model folder, as hex.

    The files are streamed. Equal digests mean equal weights and architecture; tokenizer files are left out, as they
    do not change what an adapter was trained against.
    """
    folder = Path(path)
    files = [folder / "config.json", *weight_files(folder)]
    whole = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise MissingError(f"{file} is missing")
        part = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(_CHUNK):
                part.update(block)
        whole.update(f"{file.name}:{part.hexdigest()}\n".encode())
    return whole.hexdigest()


def saved_dtype(folder: Path) -> str:
    """Type that most weights of a folder are saved in, e.g. ``bfloat16``; from the headers, or config.json for .bin."""
    sizes: dict[str, int] = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            config = _read_config(folder)
            return str(config.get("dtype") or config.get("torch_dtype") or "float32")
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - start
    most = max(sizes, key=lambda name: sizes[name], default="F32")
    return {"BF16": "bfloat16", "F16": "float16"}.get(most, "float32")


def find_base(name_or_path: str, path: str, revision: str | None) -> tuple[str, Path]:
    """Folder of an adapter's base: where it was, else where its recipe's relative name points now."""
    tried = [candidate for candidate in dict.fromkeys([path, name_or_path]) if candidate]
    for candidate in tried:
        if Path(candidate).expanduser().is_dir():
            return candidate, Path(candidate).expanduser()
    if _may_be_hub_id(name_or_path):
        return name_or_path, find_folder(name_or_path, revision)
    raise MissingError(
        f"The adapter's base model is not at {' nor at '.join(tried)}. Put it back there, or edit "
        f"{BASE_FILE} beside the adapter to say where it is now"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise MissingError(f"{folder} has no config.json, so it is not a model.{_what_it_is(folder)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MissingError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or not (config.get("model_type") or config.get("auto_map")):
        raise MissingError(f"{file} names no model_type: it is not the configuration of a model")
    return config


def _what_it_is(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f" It is an adapter: merge it first (llmkit merge {folder}) and name the merged folder."
    for inner in ("model", "adapter"):
        if (folder / inner).is_dir():
            return f" It looks like the folder of a run: name {folder / inner}."
    found = sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())
    return f" Models inside it: {', '.join(found[:5])}." if found else ""


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MissingError(f"{index} is damaged: it has no readable weight_map") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise MissingError(
            f"{index.parent} is incomplete: {len(missing)} of {len(names)} weight files are missing, "
            f"first {missing[0] if missing else 'all'} (listed in {index.name})"
        )
    return [index.parent / name for name in names]


def _may_be_hub_id(name: str) -> bool:
    """A hub id is ``name`` or ``owner/name``; everything else is a path."""
    return not name.startswith((".", "/", "~")) and "\\" not in name and 1 <= len(Path(name).parts) <= 2


def _near_names(path: Path) -> str:
    """Names like the part of ``path`` that is missing, in the deepest folder of it that exists."""
    parts = path.absolute()
    while not parts.parent.is_dir():
        parts = parts.parent
    children = sorted(child.name for child in parts.parent.iterdir() if child.is_dir() and child.name[0] != ".")
    near = difflib.get_close_matches(parts.name, children, n=3, cutoff=0.5)
    given = path if parts == path.absolute() else Path(os.path.relpath(parts))
    if near:
        return " Did you mean " + " or ".join(str(given.parent / name) for name in near) + "?"
    return f" {given.parent if str(given.parent) != '.' else 'The working directory'} is there, without {parts.name}."


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)

    def fetch(*patterns: str) -> Path:
        # Only the top folder: many repositories keep the same weights in other formats below it.
        found = snapshot_download(
            name, revision=revision, local_files_only=bool(why), allow_patterns=list(patterns), ignore_patterns="*/*"
        )
        return Path(found)

    small = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
    try:
        folder = fetch(*small, "*.safetensors") if weights else fetch(*small)
        if weights and not any((folder / file).is_file() for file in _WEIGHTS):
            folder = fetch(*small, "*.bin")
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = why or str(error).strip().splitlines()[0]
        raise MissingError(
            f"There is no folder {name} here, and it could not be fetched from the hub ({reason}).{_near_names(Path(name))}"
            "\nGive the path of a local model folder, or run once where the hub can be reached (gated models want HF_TOKEN)"
        ) from error
    return folder


def _unreachable(endpoint: str) -> str:
    """Why the hub cannot be reached, or ``""``. Asked first because the hub client retries for half a minute."""
    if any(os.environ.get(key) for key in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return ""
    host = urlsplit(endpoint).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return f"{host} cannot be reached from this machine"
    return ""


def describe_base(settings: ModelSettings, *, rows: int, dtype: str) -> BaseInfo:
    """What an adapter trained on ``settings`` records about its base.

    Raises UsageError for ``init: from_config``: random weights exist nowhere else, an adapter on them is of no use.
    """
    if settings.init == "from_config":
        raise UsageError("model.init: from_config makes random weights, which an adapter cannot be built on")
    folder = find_folder(settings.name_or_path, settings.revision)
    local = Path(settings.name_or_path).expanduser().is_dir()
    path = str(folder.resolve()) if local else settings.name_or_path
    quantization = settings.quantized.model_dump() if settings.quantized else None
    return BaseInfo(settings.name_or_path, path, model_digest(folder), rows, dtype, settings.revision, quantization)
