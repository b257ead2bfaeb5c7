"""The engine ``endpoint``: a model behind an OpenAI-compatible URL, asked by several threads with retries.

The calls are ``POST /chat/completions`` for messages and ``POST /completions`` for a text, as the OpenAI API reference
and vLLM's server have them. A parameter that a server does not know and the answer can do without is left out from
then on, and said so.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

from llmkit.errors import MissingError
from llmkit.inference.engines import Answering, Completion, Question, api_key
from llmkit.inference.settings import EndpointSettings, GenerationSettings
from llmkit.secrets import mask

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0
MAX_BODY = 64 * 1024 * 1024

_DISPENSABLE = ("response_format", "logprobs", "seed", "top_p")


class _CallError(Exception):
    """One call failed: ``status`` is the HTTP status, 0 where none came; ``wait`` what the server asked to wait."""

    def __init__(self, status: int, message: str, wait: float | None = None, *, away: bool = False) -> None:
        super().__init__(message)
        self.status, self.wait, self.away = status, wait, away


@contextmanager
def open_engine(model: EndpointSettings, generation: GenerationSettings) -> Iterator[EndpointEngine]:
    """See ``engines.open_engine``. Raises MissingError where the environment variable of the key is not set."""
    yield EndpointEngine(model, generation, api_key(model))


class EndpointEngine:
    """See ``engines.Engine``."""

    def __init__(self, model: EndpointSettings, generation: GenerationSettings, key: str | None) -> None:
        self._model, self._generation, self._key = model, generation, key
        self._pace = _Pace(model.requests_per_minute)
        self._lock = threading.Lock()
        self._left_out: set[str] = set()
        self._length_name = "max_tokens"
        self._stopped = threading.Event()
        self.notes: list[str] = []

    def answer(self, questions: Sequence[Question], *, logprobs: bool = False) -> Answering:
        self._stopped.clear()
        pool = ThreadPoolExecutor(self._model.concurrency, thread_name_prefix="llmkit-endpoint")
        try:
            asked = {pool.submit(self._ask, question, logprobs): index for index, question in enumerate(questions)}
            for future in as_completed(asked):
                yield asked[future], future.result()
        finally:
            self._stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, question: Question, logprobs: bool) -> Completion:
        """One question with its retries. Raises MissingError for a server that is away, or refuses everybody."""
        path = "completions" if isinstance(question.prompt, str) else "chat/completions"
        attempt = 0
        while True:
            body = self._body(question, logprobs)
            began = time.perf_counter()
            try:
                self._pace.wait(self._stopped)
                return _completion(self._post(path, body), time.perf_counter() - began)
            except _CallError as error:
                if error.status == 400 and self._adapt(str(error), body):
                    continue
                if error.status in (401, 403, 404):
                    raise MissingError(self._refusal(error)) from None
                retry = error.status in RETRIED or error.status == 0
                if not retry or attempt >= self._model.max_retries or self._stopped.is_set():
                    if error.away:
                        raise MissingError(f"{self._model.base_url} cannot be reached: {error}") from None
                    tries = f" (after {attempt + 1} attempts)" if attempt else ""
                    return Completion("", seconds=time.perf_counter() - began, error=f"{error}{tries}")
                attempt += 1
                self._stopped.wait(_backoff(attempt, error.wait))

    def _body(self, question: Question, logprobs: bool) -> dict[str, Any]:
        made = self._generation
        body: dict[str, Any] = {
            "model": self._model.model, "temperature": made.temperature, "top_p": made.top_p, "seed": made.seed,
            self._length_name: made.max_new_tokens,
        }  # fmt: skip
        if isinstance(question.prompt, str):
            body["prompt"] = question.prompt
            if logprobs:
                body["logprobs"] = 1
        else:
            body["messages"] = list(question.prompt)
            if logprobs:
                body["logprobs"] = True
        if question.schema is not None and self._model.constrain:
            schema = {"name": "answer", "schema": dict(question.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {key: value for key, value in body.items() if key not in self._left_out}

    def _adapt(self, message: str, body: Mapping[str, Any]) -> bool:
        """Take what a server complains about out of further calls; False when it is nothing that can be left out."""
        with self._lock:
            if "max_completion_tokens" in message and self._length_name == "max_tokens":
                self._length_name = "max_completion_tokens"
                return True
            named = next((key for key in _DISPENSABLE if key in message and key in body), None)
            if named is None:
                return False
            if named not in self._left_out:
                self._left_out.add(named)
                self.notes.append(f"{self._model.label}: the server does not take `{named}`; asked without it")
            return True

    def _refusal(self, error: _CallError) -> str:
        if error.status == 404:
            return (
                f"{self._model.label}: {self._model.base_url} has no such model or address: {error}. Check base_url "
                f"(usually it ends with /v1) and model ({self._model.model})."
            )
        key = f"the key in {self._model.api_key_env}" if self._key else "a call without a key: set api_key_env"
        return f"{self._model.label}: {self._model.base_url} refuses {key} ({error.status}: {error})."

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "llmkit"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(body, ensure_ascii=False).encode()
        url = f"{self._model.base_url.rstrip('/')}/{path}"
        request = urllib.request.Request(url, data, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._model.timeout_seconds) as reply:
                raw = reply.read(MAX_BODY)
        except urllib.error.HTTPError as error:
            raise _CallError(error.code, self._words(error), _asked_wait(error.headers.get("Retry-After"))) from None
        except TimeoutError:
            raise _CallError(0, f"no answer within {self._model.timeout_seconds:g} s (timeout_seconds)") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _CallError(0, f"no connection within {self._model.timeout_seconds:g} s", away=True) from None
            raise _CallError(0, f"{error.reason}", away=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise _CallError(0, f"the connection was lost: {error or type(error).__name__}") from None
        try:
            found = json.loads(raw)
        except ValueError:
            raise _CallError(502, f"the answer is not JSON: {raw[:80]!r}") from None
        if not isinstance(found, dict):
            raise _CallError(502, "the answer is not a JSON object")
        return found

    def _words(self, error: urllib.error.HTTPError) -> str:
        """What a server says about an error, in one line, without the key."""
        try:
            text = error.read(100_000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            found = json.loads(text)
            inner = found.get("error", found.get("detail", found)) if isinstance(found, dict) else found
            text = str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner)
        except ValueError:
            pass  # not JSON: a proxy's page, shown as it is
        text = " ".join(text.split()) or str(error.reason)
        return mask(text.replace(self._key, "***") if self._key else text)[:400]


class _Pace:
    """Spreads calls evenly over the minute."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stopped: threading.Event) -> None:
        if not self._gap:
            return
        with self._lock:
            now = time.monotonic()
            mine = max(now, self._next)
            self._next = mine + self._gap
        stopped.wait(mine - now)


def _backoff(attempt: int, asked: float | None) -> float:
    """Seconds before attempt number ``attempt`` + 1: what the server asked for, else doubling with a random part."""
    if asked is not None:
        return min(asked, LONGEST_WAIT_SECONDS)
    longest: float = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
    return longest * (0.5 + random.random() / 2)  # so that callers refused together do not come back together


def _asked_wait(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date (RFC 9110, 10.2.3)."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _completion(found: Mapping[str, Any], seconds: float) -> Completion:
    try:
        choice = found["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _CallError(502, f"the answer has no choices: {json.dumps(found)[:120]}") from None
    usage = found.get("usage") or {}
    return Completion(
        text=text or "", tokens=usage.get("completion_tokens"), prompt_tokens=usage.get("prompt_tokens"),
        seconds=seconds, finished=choice.get("finish_reason") != "length", logprob=_logprob(choice.get("logprobs")),
    )  # fmt: skip


def _logprob(found: Any) -> float | None:
    """Mean log-probability of the tokens: chat answers list them in ``content``, completions in ``token_logprobs``."""
    if not isinstance(found, dict):
        return None
    values = [entry.get("logprob") for entry in found.get("content") or []] or found.get("token_logprobs") or []
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
