"""Licences of the model and of the data, from the cards and files beside them. Light: nothing is imported but YAML.

A card is the ``README.md`` of a model's or data set's folder: its front matter names the licence
(https://huggingface.co/docs/hub/model-cards), by the hub's short name or an SPDX id. Where there is no card, the text
of a LICENSE file is recognised, or ``license:`` of the source in the recipe says it. Nothing is fetched for it: of hub
models and data sets the local cache is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmkit.data.guard.settings import GuardSettings
from llmkit.data.readers import is_uri
from llmkit.data.settings import DataSettings, EvalSplitSettings
from llmkit.data.source_settings import Sources, SourceSettings
from llmkit.data.sources import Source, resolve
from llmkit.errors import DataError
from llmkit.modeling.settings import ModelSettings

# Names of the hub that are no SPDX ids, or mean one of them.
_HUB_NAMES = {
    "llama2": "LicenseRef-llama2", "llama3": "LicenseRef-llama3", "llama3.1": "LicenseRef-llama3.1",
    "llama3.2": "LicenseRef-llama3.2", "llama3.3": "LicenseRef-llama3.3", "llama4": "LicenseRef-llama4",
    "gemma": "LicenseRef-gemma", "openrail": "LicenseRef-openrail", "openrail++": "LicenseRef-openrail-plus-plus",
    "creativeml-openrail-m": "LicenseRef-creativeml-openrail-m", "bigscience-openrail-m": "LicenseRef-bigscience-openrail-m",
    "bigscience-bloom-rail-1.0": "LicenseRef-bigscience-bloom-rail-1.0", "bigcode-openrail-m": "LicenseRef-bigcode-openrail-m",
    "deepfloyd-if-license": "LicenseRef-deepfloyd-if-license", "apple-ascl": "LicenseRef-apple-ascl", "cc": "LicenseRef-cc",
    "gpl": "LicenseRef-gpl", "lgpl": "LicenseRef-lgpl", "bsd": "LicenseRef-bsd", "gfdl": "LicenseRef-gfdl",
    "agpl-3.0": "AGPL-3.0-only", "gpl-2.0": "GPL-2.0-only", "gpl-3.0": "GPL-3.0-only", "lgpl-2.1": "LGPL-2.1-only",
    "lgpl-3.0": "LGPL-3.0-only", "cdla-permissive-1.0": "CDLA-Permissive-1.0", "pddl": "PDDL-1.0",
}  # fmt: skip
# What the hub writes for "there is one, but none that we know" and for none at all.
_NOT_SAID = {"other", "unknown", "none", ""}
# First words of common licence texts, without blanks and punctuation.
_TEXTS: tuple[tuple[str, str], ...] = (
    ("Apache-2.0", "apachelicenseversion20january2004"),
    ("MIT", "permissionisherebygrantedfreeofchargetoanypersonobtainingacopyofthissoftwareandassociateddocumentation"),
    ("GPL-3.0-only", "gnugeneralpubliclicenseversion329june2007"),
    ("AGPL-3.0-only", "gnuaffergeneralpubliclicenseversion3"),
    ("CC-BY-SA-4.0", "creativecommonsattributionsharealike40international"),
    ("CC-BY-NC-SA-4.0", "attributionnoncommercialsharealike40international"),
    ("CC-BY-NC-4.0", "attributionnoncommercial40international"),
    ("CC-BY-SA-4.0", "attributionsharealike40international"),
    ("CC-BY-4.0", "attribution40international"),
    ("CC0-1.0", "cc010universal"),
    ("BSD-3-Clause", "neitherthenameof"),
    ("BSD-2-Clause", "redistributionanduseinsourceandbinaryformswithorwithoutmodification"),
)
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Licence:
    """What is known of one model or data source: ``spdx`` is an SPDX expression, ``""`` where nothing says it."""

    what: Literal["model", "data"]
    key: str
    name: str
    spdx: str
    said_by: str


def licences(model: ModelSettings | None, data: DataSettings | None) -> list[Licence]:
    """Licences of the recipe's model and data sources; a missing card is no error.

    Raises DataError for a source whose files are not there.
    """
    found = []
    if model is not None:
        found.append(_of_model("model.name_or_path", model.name_or_path, model.revision))
    if data is not None:
        named: list[tuple[str, Sources]] = [("data.train", data.train)]
        if data.eval is not None and not isinstance(data.eval, EvalSplitSettings):
            named.append(("data.eval", data.eval))
        for key, sources in named:
            found += _of_sources(key, sources, data)
    return found


def _of_model(key: str, name: str, revision: str | None) -> Licence:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        cached = hub_snapshot("models", name, revision)
        if cached is None:
            return Licence("model", key, name, "", "")
        folder = cached
    spdx, by = of_folder(folder)
    return Licence("model", key, name, spdx, by)


def _of_sources(key: str, sources: Sources, data: DataSettings) -> list[Licence]:
    entries = sources if isinstance(sources, list) else [sources]
    found = []
    for entry, source in zip(entries, resolve(sources, key, data), strict=True):
        said = entry.license if isinstance(entry, SourceSettings) else None
        spdx, by = (normal(said), "the recipe") if said else _of_source(source)
        found.append(Licence("data", source.key, source.path, spdx, by))
    return found


def _of_source(source: Source) -> tuple[str, str]:
    if source.is_hub:
        folder = hub_snapshot("datasets", source.path, None)
        return of_folder(folder) if folder is not None else ("", "")
    if is_uri(source.path):
        return "", ""
    folders = sorted({Path(name).absolute().parent for name in source.files()})
    parts = [of_folder(folder) for folder in folders]
    names = sorted({spdx for spdx, _ in parts})
    if not all(names):
        return "", ""
    return " AND ".join(f"({n})" if len(names) > 1 and " " in n else n for n in names), ", ".join(by for _, by in parts)


def of_folder(folder: Path) -> tuple[str, str]:
    """``(SPDX expression, the file that says it)`` of a folder; ``("", "")`` where no file does."""
    card = folder / "README.md"
    if card.is_file() and (spdx := _of_card(card)):
        return spdx, str(card)
    for name in _FILES:
        path = folder / name
        if path.is_file() and (spdx := recognise(path.read_text(encoding="utf-8", errors="replace"))):
            return spdx, str(path)
    for name in ("config.json", "dataset_info.json"):
        path = folder / name
        if path.is_file() and (spdx := _of_config(path)):
            return spdx, str(path)
    return "", ""


def _of_card(path: Path) -> str:
    import yaml

    match = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n"))
    try:
        front = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return ""
    return _of_mapping(front)


def _of_config(path: Path) -> str:
    try:
        return _of_mapping(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        return ""


def _of_mapping(front: Any) -> str:
    if not isinstance(front, dict):
        return ""
    said = front.get("license", front.get("licence"))
    names = [str(name) for name in (said if isinstance(said, list) else [said]) if name]
    own = str(front.get("license_name") or "")
    normed = [normal(own) if own and name.lower() == "other" else normal(name) for name in names]
    # of several licences that a card names, all are taken to hold
    return (
        " AND ".join(f"({name})" if len(normed) > 1 and " " in name else name for name in normed) if all(normed) else ""
    )


def normal(name: str) -> str:
    """SPDX expression for a name as cards write it; ``LicenseRef-…`` for one that SPDX does not list; ``""`` for none."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    plain = name.strip()
    if plain.lower() in _NOT_SAID:
        return ""
    if plain.lower() in _HUB_NAMES:
        return _HUB_NAMES[plain.lower()]
    try:
        return str(canonicalize_license_expression(plain))
    except InvalidLicenseExpression:
        return "LicenseRef-" + (re.sub(r"[^A-Za-z0-9.-]+", "-", plain).strip("-") or "unnamed")


def recognise(text: str) -> str:
    """SPDX id of a licence text by its characteristic words, ``""`` for another text."""
    plain = re.sub(r"[^a-z0-9]+", "", text[:20_000].lower())
    return next((spdx for spdx, words in _TEXTS if words in plain), "")


def hub_snapshot(kind: Literal["models", "datasets"], name: str, revision: str | None) -> Path | None:
    """Folder of a hub model or data set in the local cache, None where it is not there. Asks no server."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    repository = cache / f"{kind}--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision or ""
    folder = repository / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def allowed(spdx: str, allow: Sequence[str]) -> bool:
    """Whether allowed ids satisfy an SPDX expression: every part of AND, one part of OR (SPDX 2.3, annex D)."""
    if not spdx:
        return False
    known = {normal(name).lower() for name in allow}
    joined = re.sub(r"\s+WITH\s+", "\0", spdx, flags=re.IGNORECASE)
    tokens = [token.replace("\0", " with ") for token in re.findall(r"\(|\)|[^\s()]+", joined)]
    return _Expression(tokens, known).either()


class _Expression:
    """OR binds least, AND more, parentheses most."""

    def __init__(self, tokens: list[str], known: set[str]) -> None:
        self._tokens, self._known = tokens, known

    def either(self) -> bool:
        value = self._both()
        while self._take("or"):
            value = self._both() or value
        return value

    def _both(self) -> bool:
        value = self._one()
        while self._take("and"):
            value = self._one() and value
        return value

    def _one(self) -> bool:
        if not self._take("("):
            return self._tokens.pop(0).lower() in self._known
        value = self.either()
        self._take(")")
        return value

    def _take(self, token: str) -> bool:
        if self._tokens and self._tokens[0].lower() == token:
            self._tokens.pop(0)
            return True
        return False


def refuse(found: Sequence[Licence], guard: GuardSettings | None) -> None:
    """Raises DataError naming every licence that ``data.guard.allow_licenses`` does not have, and every unknown one."""
    allow = guard.allow_licenses if guard is not None else None
    if allow is None:
        return
    wrong = [licence for licence in found if not allowed(licence.spdx, allow)]
    if wrong:
        lines = "\n".join(f"    {w.key}: {w.name}: {_says(w)}" for w in wrong)
        raise DataError(
            f"data.guard.allow_licenses allows {', '.join(allow)}, and not:\n{lines}\n"
            "  Where nothing says the licence of a source, write it: {path: …, license: Apache-2.0}; of a model, into the "
            "front matter of its README.md."
        )


def _says(licence: Licence) -> str:
    return f"{licence.spdx} (says {licence.said_by})" if licence.spdx else "unknown, no card says it"


def as_rows(found: Sequence[Licence]) -> list[dict[str, str]]:
    """Plain mappings for reports."""
    return [{"of": w.key, "name": w.name, "license": w.spdx or "unknown", "said_by": w.said_by} for w in found]


def as_tags(found: Sequence[Licence]) -> dict[str, str]:
    """``license.model`` and ``license.data`` for the tracker; several are joined."""
    tags = {}
    for what in ("model", "data"):
        names = sorted({w.spdx or "unknown" for w in found if w.what == what})
        if names:
            tags[f"license.{what}"] = "; ".join(names)
    return tags
