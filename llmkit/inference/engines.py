"""What answers prompts: a small table of engines that all take the same question and give the same answer.

A new engine is a module with ``open_engine`` and a line in ``ENGINES``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import yaml

from llmkit.data.rows import Message
from llmkit.errors import MissingError, UsageError
from llmkit.inference.settings import AnsweringModel, EndpointSettings, GenerationSettings, LocalModelSettings

ENGINES: dict[str, str] = {
    "transformers": "llmkit.inference.local",
    "endpoint": "llmkit.inference.endpoint",
}


@dataclass(frozen=True)
class Question:
    """A prompt: messages for the model's chat template, or a text that is continued.

    ``schema`` is a JSON schema that the answer should follow, for engines that can hold a model to it.
    """

    prompt: Sequence[Message] | str
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Completion:
    """An answer. ``tokens`` counts those generated, ``seconds`` the time it took, ``finished`` is False for a cut one.

    ``logprob`` is the mean natural logarithm of the probability of its tokens, None where it was not asked for or the
    engine does not tell. ``error`` says why there is no answer.
    """

    text: str
    tokens: int | None = None
    prompt_tokens: int | None = None
    seconds: float = 0.0
    finished: bool = True
    logprob: float | None = None
    error: str | None = None


Answering = Generator[tuple[int, Completion], None, None]
"""Answers with the index of their question, as they come; closing it ends what is under way."""


class Engine(Protocol):
    """``notes`` is what a user should know."""

    notes: list[str]

    def answer(self, questions: Sequence[Question], *, logprobs: bool = False) -> Answering:
        """Answers with the index of their question, as they come. A question that fails is a Completion with an error.

        Raises MissingError when the engine as a whole cannot answer.
        """
        ...


def open_engine(model: AnsweringModel, generation: GenerationSettings) -> AbstractContextManager[Engine]:
    """The engine of a model; leaving it gives its memory back. Raises MissingError where there is no such model."""
    module = import_module(ENGINES[model.engine])
    opened: AbstractContextManager[Engine] = module.open_engine(model, generation)
    return opened


def identity(model: AnsweringModel) -> str | None:
    """What decides a model's answers beside prompt and sampling, loading nothing; None where it may change unseen.

    Raises MissingError where there is no such model.
    """
    if isinstance(model, EndpointSettings):
        return None
    from llmkit.modeling.locate import find_folder, fingerprint, weights_folder

    folder = find_folder(model.name_or_path, model.revision)
    template = Path(model.chat_template) if model.chat_template and "{" not in model.chat_template else None
    text = template.read_text(encoding="utf-8") if template is not None and template.is_file() else model.chat_template
    parts = [fingerprint(weights_folder(folder)), model.dtype, str(system_of(model, folder)), str(text)]
    return "sha256:" + hashlib.sha256("\0".join(parts).encode()).hexdigest()


def require(model: AnsweringModel) -> None:
    """Raises MissingError for a model that is not there, or the key of a URL that is not set: before anything is asked."""
    if isinstance(model, EndpointSettings):
        api_key(model)
    else:
        identity(model)


def api_key(model: EndpointSettings) -> str | None:
    """The API key of a URL, from the environment. Raises MissingError where it is named and not there."""
    if model.api_key_env is None:
        return None
    key = os.environ.get(model.api_key_env, "").strip()
    if not key:
        raise MissingError(
            f"{model.label}: the environment variable {model.api_key_env}, which should hold the API key of "
            f"{model.base_url}, is not set. Set it, or remove api_key_env where the server wants no key."
        )
    return key


def system_of(model: LocalModelSettings, folder: Path) -> str | None:
    """The system message put before prompts that have none: the recipe's, else the one that the run was trained with."""
    return trained_system(folder) if model.system is None else model.system or None


def trained_system(run: str | Path) -> str | None:
    """``data.system`` of a run's recipe: with it the prompts are those of the training; None where there is none."""
    recipe = Path(run) / "recipe.yaml"
    if not recipe.is_file():
        return None
    try:
        system = yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"]["system"]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UsageError(f"{recipe} is not the recipe of a run. Name its model/ or adapter/ folder instead") from error
    return str(system) if system else None
