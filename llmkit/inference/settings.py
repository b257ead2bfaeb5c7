"""Settings of a model that answers: one that is loaded here, or one behind a URL; and how answers are made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field

from llmkit.recipe import Conflict, Settings


class LocalModelSettings(Settings):
    """A model that llmkit loads: a folder, a hub id, a run's output folder or an adapter's."""

    engine: ClassVar[str] = "transformers"
    free_text: ClassVar[frozenset[str]] = frozenset({"system", "chat_template"})

    name_or_path: Annotated[str, Field(min_length=1)]
    """A model folder, a hub id, or the output folder of a run; an adapter is put on its base."""
    name: str | None = None
    """Name in tables and reports; None takes the last part of ``name_or_path``."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; ``auto`` keeps the type they were saved in."""
    device: str | None = None
    """Device, e.g. ``cuda:1``; None takes a GPU where there is one."""
    system: str | None = None
    """System message put before prompts that have none; None takes the one that a run was trained with."""
    chat_template: str | None = None
    """Jinja chat template (text, a ``.jinja`` file, or ``chatml``, ``dialogue``) used instead of the tokenizer's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @property
    def label(self) -> str:
        return self.name or self.name_or_path.rstrip("/").rpartition("/")[2] or self.name_or_path


class EndpointSettings(Settings):
    """A model behind an OpenAI-compatible URL: vLLM, SGLang, TGI, llama.cpp, Ollama, a vendor's API."""

    engine: ClassVar[str] = "endpoint"

    base_url: Annotated[str, Field(min_length=1)]
    """Address up to the version, e.g. ``http://localhost:8000/v1``."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the model, as the server knows it."""
    name: str | None = None
    """Name in tables and reports; None takes ``model``."""
    api_key_env: str | None = None
    """Environment variable that holds the API key; None sends no key."""
    tokenizer: str | None = None
    """Folder or hub id of the model's tokenizer, for the static checks; None leaves them out for this model."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Longest wait for one answer."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """Further attempts after a timeout, a lost connection, 408, 409, 429 or 5xx, each after a longer wait."""
    concurrency: Annotated[int, Field(ge=1)] = 4
    """Requests that are under way at the same time."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Most requests a minute; None has no limit."""
    constrain: bool = True
    """Ask the server to keep to a template's ``output_schema`` (``response_format``), where it can."""

    def conflicts(self) -> Iterator[Conflict]:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield Conflict("base_url", "is no URL", "write it whole, e.g. http://localhost:8000/v1")
        elif re.search(r"/(chat/)?completions/?$", parts.path):
            yield Conflict("base_url", "is the address of one call", "leave out /chat/completions: it is added")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            yield Conflict("api_key_env", "is not the name of an environment variable", "e.g. OPENAI_API_KEY")

    @property
    def label(self) -> str:
        return self.name or self.model


AnsweringModel = LocalModelSettings | EndpointSettings
ModelChoice = Annotated[str, Field(min_length=1)] | LocalModelSettings | EndpointSettings


def as_model(choice: str | AnsweringModel) -> AnsweringModel:
    """A model written as plain text is a folder, a run or a hub id."""
    return LocalModelSettings(name_or_path=choice) if isinstance(choice, str) else choice


class GenerationSettings(Settings):
    """How answers are made."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens of this total share only."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampling; every answer is drawn from it anew, whatever runs beside it."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Prompts that a local model answers at the same time."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.top_p < 1 and self.temperature == 0:
            yield Conflict("top_p", "is not used at temperature 0", "set a temperature, e.g. 0.7", ("temperature",))
