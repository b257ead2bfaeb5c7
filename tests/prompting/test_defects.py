"""Defects planted in chat templates of known families are all found, and clean families raise no alarm.

The families and defects are those of benchmarks/template_defects.py, which also takes the families' real vocabularies.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))

from chat_families import DEFECTS, FAMILIES, Family, Tokenizers  # noqa: E402
from template_defects import check, check_foreign, write_all  # noqa: E402

QUICK = ("llama-3.1", "qwen-3", "mistral-v0.3", "phi-3.5", "zephyr")


def test_the_list_is_long_enough() -> None:
    assert len(FAMILIES) >= 10
    assert len(DEFECTS) == 12


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name in QUICK], ids=lambda f: f.name)
def test_planted_defects_are_found_and_clean_templates_pass(
    family: Family, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.getbasetemp() / "vocabulary"
    planted = write_all(tmp_path_factory.mktemp(family.name), Tokenizers(None, cache), (family,))
    for one in planted:
        check(one)
    clean = planted[0]
    assert clean.reported == set()
    missed = {one.name: one.found for one in planted[1:] if not one.hit}
    assert not missed
    assert all(check_foreign(clean).values())
