"""Write a finished model or adapter in Hugging Face's layout, and open it again in a fresh process before it counts."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.errors import GateError
from llmkit.files import flush
from llmkit.modeling.load import check_finite, embedding_rows, plain_attention, quiet
from llmkit.modeling.locate import BaseInfo
from llmkit.modeling.probe import Probe, take_probe

__all__ = ["Probe", "VerifyReport", "atomic_folder", "save_adapter", "save_model", "take_probe", "verify"]

MAX_SHARD = "5GB"
_OF_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "ROLE_RANK")
_OF_THE_LAUNCHER_PREFIXES = ("MASTER_", "TORCHELASTIC_", "PET_", "ACCELERATE_", "FSDP_", "DEEPSPEED_")


@dataclass(frozen=True)
class VerifyReport:
    """What the fresh process found; ``relative`` and ``largest`` are the difference of the logits, see probe.py."""

    relative: float
    largest: float
    tolerance: float
    dtype: str
    seconds: float


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    stop_ids: Sequence[int],
    chat_template: str | None = None,
) -> Path:
    """Write weights (safetensors), configuration, generation settings, tokenizer and chat template into ``folder``.

    The stop tokens become eos in config.json and generation_config.json, so that every engine stops where training
    stopped. The folder appears complete or not at all; an older one of that name is replaced. Raises MissingError
    for weights that are not finite.
    """
    target = Path(folder)
    check_finite(model, "the trained model")
    with _stops_written(model, tokenizer, stop_ids), plain_attention(model), quiet(), atomic_folder(target) as work:
        model.save_pretrained(str(work), max_shard_size=MAX_SHARD)
        _save_tokenizer(tokenizer, work, chat_template)
    return target


def save_adapter(
    peft_model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    base: BaseInfo,
    *,
    stop_ids: Sequence[int] = (),
    chat_template: str | None = None,
) -> Path:
    """Write an adapter in PEFT's layout with its tokenizer, generation settings and ``llmkit_base.json``.

    An embedding that has grown since ``base`` was saved goes along with it. Atomic like :func:`save_model`.
    """
    target = Path(folder)
    check_finite(peft_model, "the trained adapter")
    bare: PreTrainedModel = peft_model.get_base_model()
    grown = embedding_rows(bare) != base.rows
    initial = getattr(peft_model, "_llmkit_initial_adapter", None)
    peft_model.peft_config["default"].base_model_name_or_path = base.path
    peft_model.peft_config["default"].revision = base.revision
    with atomic_folder(target) as work:
        peft_model.save_pretrained(
            str(work),
            save_embedding_layers=grown,
            path_initial_model_for_weight_conversion=initial,
        )
        (work / "README.md").unlink(missing_ok=True)
        _save_tokenizer(tokenizer, work, chat_template)
        if stop_ids and bare.generation_config is not None:
            with _stops_written(bare, tokenizer, stop_ids):
                bare.generation_config.save_pretrained(str(work))
        base.write(work)
    return target


def save_description(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    base: BaseInfo | None = None,
    *,
    stop_ids: Sequence[int] = (),
    chat_template: str | None = None,
) -> Path:
    """Write into ``folder`` what makes weights a model: configuration, generation settings, tokenizer, chat template.

    Of a PEFT model, with its ``base``, the adapter's configuration. The weights themselves are left out.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    bare: PreTrainedModel = model.get_base_model() if base is not None else model
    with _stops_written(bare, tokenizer, stop_ids), plain_attention(bare), quiet():
        bare.config.save_pretrained(str(target))
        if bare.generation_config is not None:
            bare.generation_config.save_pretrained(str(target))
        _save_tokenizer(tokenizer, target, chat_template)
    if base is not None:
        config = copy.deepcopy(model.peft_config["default"])
        config.base_model_name_or_path, config.revision, config.inference_mode = base.path, base.revision, True
        config.save_pretrained(str(target))
        base.write(target)
    return target


def verify(folder: str | Path, probe: Probe, *, timeout_s: float = 3600) -> VerifyReport:
    """Open ``folder`` (a model or an adapter) in a fresh process and hold it against the model in memory.

    Checked: every tensor finite, all shapes those of the configuration, no weight missing or left over, tied weights
    tied, an embedding row for every token, the adapter fits its base, and the logits of ``probe`` the same within the
    tolerance of the type. A run whose model cannot be reopened has failed its last quality bound: raises GateError.
    """
    target = Path(folder)
    with tempfile.TemporaryDirectory(prefix="llmkit-verify-") as scratch:
        file = Path(scratch) / "probe.npz"
        probe.save(file)
        command = [sys.executable, "-m", "llmkit.modeling.verify", str(target), str(file)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, env=_plain_environment(), check=False
            )
        except subprocess.TimeoutExpired as error:
            raise GateError(f"{target} could not be reopened within {timeout_s:.0f} s") from error
    last = done.stdout.strip().splitlines()[-1:] or [""]
    try:
        found: dict[str, Any] = json.loads(last[0])
    except ValueError as error:
        tail = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise GateError(f"{target} could not be reopened: the process ended with {done.returncode}: {tail}") from error
    if found["problems"]:
        listed = "\n".join(f"  - {problem}" for problem in found["problems"])
        raise GateError(f"{target} was written but is not what was trained:\n{listed}")
    return VerifyReport(**found["report"])


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A work folder beside ``target`` that becomes ``target``, flushed to disk, when the block ends without an error.

    Leftovers of a process that was killed here are removed; an existing ``target`` is replaced at the very end.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    work.chmod(0o777 & ~_umask())
    try:
        yield work
        _flush(work)
        if target.exists():
            old = work.with_name(f".{target.name}.part-old")
            target.rename(old)
            work.rename(target)
            shutil.rmtree(old)
        else:
            work.rename(target)
        flush(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str | None) -> None:
    """Tokenizer files, with the template in force; the caller's object is left as it was."""
    kept = copy.copy(tokenizer)
    if chat_template is not None:
        kept.chat_template = chat_template
    kept.save_pretrained(str(folder))


@contextmanager
def _stops_written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> Iterator[None]:
    """Within it the model's configurations name the stop and padding tokens; sampling settings are made consistent."""
    configs: list[Any] = [model.config.get_text_config()]
    generation: Any = model.generation_config
    if generation is not None:
        configs.append(generation)
        if not generation.do_sample and any(
            getattr(generation, key, None) not in (None, default) for key, default in _SAMPLING_DEFAULTS.items()
        ):
            # Some models ship a temperature without do_sample, which transformers refuses to write.
            generation.do_sample = True
    before = [(config.eos_token_id, config.pad_token_id) for config in configs]
    eos = list(dict.fromkeys(int(i) for i in stop_ids))
    for config in configs:
        if eos:
            config.eos_token_id = eos[0] if len(eos) == 1 else eos
        config.pad_token_id = tokenizer.pad_token_id
    try:
        yield
    finally:
        for config, (eos_id, pad_id) in zip(configs, before, strict=True):
            config.eos_token_id, config.pad_token_id = eos_id, pad_id


_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}


def _plain_environment() -> dict[str, str]:
    """The environment without what a launcher set for the training processes, and without the network."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in _OF_THE_LAUNCHER and not key.startswith(_OF_THE_LAUNCHER_PREFIXES)
    }
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _flush(folder: Path) -> None:
    """Down to the disk; with the rights that the user's umask gives, as safetensors writes files for the owner alone."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(0o666 & ~_umask())
        flush(path)
    flush(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
