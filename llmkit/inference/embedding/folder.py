"""What kind of embedding model a folder holds: a sentence-transformers folder, a plain model, an adapter or a run.

The format of sentence-transformers' folders: ``modules.json`` lists the modules in order with their folders; the
``Transformer`` module's folder has ``sentence_bert_config.json``, ``Pooling`` and ``Dense`` have a ``config.json``;
``config_sentence_transformers.json`` beside ``modules.json`` holds the prompts. Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import MissingError, UsageError
from llmkit.modeling.locate import find_folder, fingerprint, weights_folder

MODULES = "modules.json"
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES = {"lasttoken": "last", "weightedmean": "weighted_mean", "mean_sqrt_len_tokens": "mean_sqrt_len"}
_UNDERSTOOD = "Transformer, CLIPModel, Pooling, Dense, Normalize, LayerNorm and Dropout"


@dataclass(frozen=True)
class Module:
    """A step behind the pooling: ``dense``, ``layer_norm`` (with a folder of weights) or ``normalize``."""

    kind: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingFolder:
    """``weights`` has the model (or adapter), ``kind`` is ``text`` or ``clip``; the rest is None or empty where the folder
    says nothing: ``pooling`` modes, ``include_prompt``, ``max_length`` in tokens, ``prompts`` by name, ``modules`` in order.
    """

    root: Path
    weights: Path
    kind: str = "text"
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    modules: tuple[Module, ...] = ()

    @property
    def is_adapter(self) -> bool:
        return (self.weights / "adapter_config.json").is_file()

    def digest(self) -> str:
        """By what a resumed job knows that the model is the same: the content of the folders, large files by size and time."""
        whole = hashlib.sha256()
        folders = [self.root, self.weights, *(module.folder for module in self.modules if module.folder.is_dir())]
        for folder in dict.fromkeys(folders):
            whole.update(fingerprint(folder).encode())
        return f"sha256:{whole.hexdigest()}"


def read_folder(name_or_path: str, revision: str | None = None) -> EmbeddingFolder:
    """What is at ``name_or_path``: a folder, a run's output folder or a hub id.

    Raises MissingError where there is no model, or one that is damaged, UsageError for a module that llmkit does not know.
    """
    root = find_folder(name_or_path, revision)
    if not (root / MODULES).is_file():
        return EmbeddingFolder(root, weights_folder(root), _kind(weights_folder(root)))
    return _sentence_transformers(root)


def _sentence_transformers(root: Path) -> EmbeddingFolder:
    listed = _json(root / MODULES)
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise MissingError(f"{root / MODULES} is damaged: it is no list of modules")
    kinds = [str(entry.get("type", "")).rpartition(".")[2] for entry in listed]
    folders = [root / str(entry.get("path", "")) for entry in listed]
    if kinds[0] not in ("Transformer", "CLIPModel"):
        raise UsageError(f"{root}: its first module is {kinds[0]}; llmkit knows {_UNDERSTOOD}")
    settings = _optional(folders[0] / "sentence_bert_config.json")
    prompts = _optional(root / "config_sentence_transformers.json")
    pooling: tuple[str, ...] | None = None
    include_prompt = True
    later: list[Module] = []
    for kind, folder in zip(kinds[1:], folders[1:], strict=True):
        if kind == "Pooling":
            config = _json(folder / "config.json")
            pooling, include_prompt = _pooling(config, folder), bool(config.get("include_prompt", True))
        elif kind == "Normalize":
            later.append(Module("normalize", folder))
        elif kind in ("Dense", "LayerNorm"):
            later.append(_weighted(kind, folder))
        elif kind != "Dropout":  # nothing is dropped in inference
            raise UsageError(f"{root}: it has a module {kind}; llmkit knows {_UNDERSTOOD}")
    length = settings.get("max_seq_length")
    return EmbeddingFolder(
        root, folders[0], "clip" if kinds[0] == "CLIPModel" else _kind(folders[0]),
        pooling=pooling, include_prompt=include_prompt,
        max_length=length if isinstance(length, int) else None, lower_case=bool(settings.get("do_lower_case")),
        prompts={str(k): str(v) for k, v in (prompts.get("prompts") or {}).items() if v},
        default_prompt=prompts.get("default_prompt_name"), modules=tuple(later),
    )  # fmt: skip


def _kind(folder: Path) -> str:
    """``clip`` for a model of two towers, whose configuration has a projection of both; ``text`` for any other."""
    config = _optional(folder / "config.json")
    two_towers = isinstance(config.get("text_config"), dict) and isinstance(config.get("vision_config"), dict)
    kind = str(config.get("model_type", ""))
    return "clip" if two_towers and ("clip" in kind or "siglip" in kind or "align" in kind) else "text"


def _pooling(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    if named is not None:
        modes = [named] if isinstance(named, str) else list(named)
        found = tuple(_POOLING_NAMES.get(str(mode), str(mode)) for mode in modes)
    else:
        found = tuple(mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)) or ("mean",)
    unknown = [mode for mode in found if mode not in _POOLING_FLAGS.values()]
    if unknown:
        raise UsageError(f"{folder}: llmkit does not know the pooling {', '.join(unknown)}")
    return found


def _weighted(kind: str, folder: Path) -> Module:
    config = _json(folder / "config.json")
    source = config.get("module_input_name", "sentence_embedding")
    target = config.get("module_output_name") or source
    if kind == "Dense" and (source, target) != ("sentence_embedding", "sentence_embedding"):
        raise UsageError(f"{folder}: its Dense module works on {source}; llmkit has it behind the pooling only")
    if not any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        raise MissingError(f"{folder} has no weights (model.safetensors) of its {kind} module")
    return Module("dense" if kind == "Dense" else "layer_norm", folder, config)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise MissingError(f"{path} is missing: the sentence-transformers folder is not complete") from None
    except ValueError as error:
        raise MissingError(f"{path} is not JSON: {error}") from error


def _optional(path: Path) -> dict[str, Any]:
    found = _json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
