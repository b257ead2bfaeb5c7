"""Licences from cards, licence files, configurations and the hub's cache, held against what a recipe allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmkit.data.guard.settings import GuardSettings
from llmkit.data.settings import DataSettings
from llmkit.errors import DataError
from llmkit.modeling.licences import allowed, as_rows, as_tags, licences, normal, of_folder, recognise, refuse
from llmkit.modeling.settings import ModelSettings

REPO = Path(__file__).resolve().parent.parent.parent
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    def make(name: str = "model", **files: str) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (path / file.replace("_", ".")).write_text(text, encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize(
    ("card", "spdx"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model", "Apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "MIT"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "MIT AND CC-BY-4.0"),
        ("---\nlicense: llama3.1\n---\n", "LicenseRef-llama3.1"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "LicenseRef-qwen-research"),
        ("---\nlicense: other\n---\n", ""),
        ("---\nlicense: unknown\n---\n", ""),
        ("---\nlicense: [oops\n---\n", ""),
        ("# no front matter\nlicense: mit", ""),
        ("", ""),
    ],
)
def test_cards(card: str, spdx: str, folder: Folder) -> None:
    assert of_folder(folder(README_md=card))[0] == spdx


def test_licence_files_and_configurations_where_there_is_no_card(folder: Folder) -> None:
    assert of_folder(folder("a", LICENSE=(REPO / "LICENSE").read_text(encoding="utf-8")))[0] == "Apache-2.0"
    found, by = of_folder(folder("b", dataset__info_json="{}", dataset_info="x"))
    assert (found, by) == ("", "")
    assert of_folder(folder("c", config_json='{"license": "cc-by-nc-4.0"}'))[0] == "CC-BY-NC-4.0"
    path = folder("d", README_md="---\nlicense: mit\n---\n", LICENSE="Apache License Version 2.0, January 2004")
    assert of_folder(path) == ("MIT", str(path / "README.md")), "the card is asked first"


def test_texts_are_recognised() -> None:
    assert recognise("Permission is hereby granted, free of charge, to any person obtaining a copy\nof this software and "
                     "associated documentation files") == "MIT"  # fmt: skip
    assert recognise("Creative Commons Attribution-ShareAlike 4.0 International Public License") == "CC-BY-SA-4.0"
    assert recognise("Attribution-NonCommercial 4.0 International") == "CC-BY-NC-4.0"
    assert recognise("All rights reserved.") == ""


@pytest.mark.parametrize(
    ("name", "spdx"),
    [("apache-2.0", "Apache-2.0"), ("MIT", "MIT"), ("gpl-3.0", "GPL-3.0-only"), ("gemma", "LicenseRef-gemma"),
     ("mit or apache-2.0", "MIT OR Apache-2.0"), ("Our own one!", "LicenseRef-Our-own-one"), ("other", ""), (" ", "")],
)  # fmt: skip
def test_names(name: str, spdx: str) -> None:
    assert normal(name) == spdx


@pytest.mark.parametrize(
    ("spdx", "fits"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("(MIT OR GPL-3.0-only) AND Apache-2.0", True),
        ("MIT AND (GPL-3.0-only OR LGPL-3.0-only)", False),
        ("GPL-3.0-only OR MIT AND Apache-2.0", True),
        ("Apache-2.0 WITH LLVM-exception", False),
        ("LicenseRef-llama3", True),
        ("", False),
    ],
)
def test_expressions(spdx: str, fits: bool) -> None:
    assert allowed(spdx, ["MIT", "apache-2.0", "llama3"]) is fits


def test_a_recipe_is_refused_for_each_licence_that_is_not_allowed(folder: Folder, tmp_path: Path) -> None:
    model = folder("model", README_md="---\nlicense: gpl-3.0\n---\n")
    known, unknown = folder("known", README_md="---\nlicense: mit\n---\n"), folder("unknown")
    for place in (known, unknown):
        (place / "rows.jsonl").write_text('{"text": "a"}\n')
    data = DataSettings.model_validate(
        {
            "train": [str(known / "rows.jsonl"), str(unknown / "rows.jsonl")],
            "eval": {"path": str(unknown / "rows.jsonl"), "license": "apache-2.0"},
        }
    )
    found = licences(ModelSettings(name_or_path=str(model)), data)
    assert [licence.spdx for licence in found] == ["GPL-3.0-only", "MIT", "", "Apache-2.0"]
    with pytest.raises(DataError) as refusal:
        refuse(found, GuardSettings(allow_licenses=["MIT", "Apache-2.0"]))
    message = str(refusal.value)
    assert "GPL-3.0-only (says" in message and "README.md" in message
    assert "data.train[1]" in message and "unknown" in message
    assert "data.train[0]" not in message and "data.eval" not in message
    refuse(found, GuardSettings())
    refuse(found, None)
    assert as_tags(found) == {"license.model": "GPL-3.0-only", "license.data": "Apache-2.0; MIT; unknown"}
    assert as_rows(found)[2] == {
        "of": "data.train[1]", "name": str(unknown / "rows.jsonl"), "license": "unknown", "said_by": "",
    }  # fmt: skip


def test_the_hubs_cache_is_read_and_no_server_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "README.md").write_text("---\nlicense: gemma\n---\n")
    (found,) = licences(ModelSettings(name_or_path="org/name"), None)
    assert found.spdx == "LicenseRef-gemma"
    (other,) = licences(ModelSettings(name_or_path="org/other"), None)
    assert other.spdx == ""


def test_the_allowed_ids_are_spdx_ids() -> None:
    with pytest.raises(ValidationError, match="no SPDX id"):
        GuardSettings(allow_licenses=["Apache 2"])
    with pytest.raises(ValidationError, match="allows nothing"):
        GuardSettings(allow_licenses=[])
    assert GuardSettings(allow_licenses=["LicenseRef-llama3"]).allow_licenses == ["LicenseRef-llama3"]
