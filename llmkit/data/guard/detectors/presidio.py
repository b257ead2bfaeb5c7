"""Names of people and addresses by Presidio and the spaCy models that are installed (extra ``presidio``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

from llmkit.data.guard.detectors.base import Finder, Match
from llmkit.errors import MissingError

_log = logging.getLogger("llmkit.guard")

# Language, and what tells its text from the others': the script. English is what is left.
_SCRIPTS = (("ko", "가", "힣"), ("ja", "ぁ", "ヿ"), ("zh", "一", "鿿"))
_SIZES = ("trf", "lg", "md", "sm")
_GENRE = {"en": "web", "zh": "web", "ko": "news", "ja": "news"}
_ENTITIES = {"name": "PERSON", "address": "LOCATION"}
_MIN_SCORE = 0.5


def finder(kind: str) -> Finder:
    """A finder for ``name`` or ``address`` in the languages that have an installed spaCy model.

    Raises MissingError when Presidio or every model is missing.
    """
    if find_spec("presidio_analyzer") is None:
        raise MissingError.extra("presidio-analyzer", "presidio")
    models = installed_models()
    if not models:
        raise MissingError(
            f"finding {kind}s needs a spaCy model, and none is installed."
            " Install one for each of your languages: python -m spacy download en_core_web_lg"
            " (Korean: ko_core_news_lg, Chinese: zh_core_web_lg, Japanese: ja_core_news_lg)"
        )
    if without := sorted(set(_GENRE) - set(models)):
        _log.warning(
            "%s: looked for in %s text; no spaCy model for %s", kind, ", ".join(sorted(models)), ", ".join(without)
        )
    entity = _ENTITIES[kind]

    def find(text: str) -> Iterator[Match]:
        language = language_of(text)
        if language not in models:
            return
        for result in _engine(tuple(sorted(models.items()))).analyze(text, language, entities=[entity]):
            if result.score >= _MIN_SCORE:
                yield Match(result.start, result.end, " ".join(text[result.start : result.end].casefold().split()))

    return find


def installed_models() -> dict[str, str]:
    """Language to the largest spaCy model that is installed for it."""
    names = {lang: [f"{lang}_core_{genre}_{size}" for size in _SIZES] for lang, genre in _GENRE.items()}
    found = {lang: next((name for name in options if find_spec(name)), None) for lang, options in names.items()}
    return {lang: name for lang, name in found.items() if name}


def language_of(text: str) -> str:
    """The language by script: Hangul, then kana, then Chinese characters, else English."""
    return next((lang for lang, low, high in _SCRIPTS if any(low <= char <= high for char in text)), "en")


@cache
def _engine(models: tuple[tuple[str, str], ...]) -> Any:
    """One engine a process: loading the models takes seconds."""
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    settings = {
        "nlp_engine_name": "spacy",
        "models": [{"lang_code": lang, "model_name": name} for lang, name in models],
    }
    languages = [lang for lang, _ in models]
    engine = NlpEngineProvider(nlp_configuration=settings).create_engine()
    return AnalyzerEngine(nlp_engine=engine, supported_languages=languages)
