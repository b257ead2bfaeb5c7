"""The command line reference is generated, and current."""

from __future__ import annotations

from llmkit.cli_docs import TARGET, reference
from llmkit.stages import STAGES


def test_the_page_is_current() -> None:
    assert TARGET.read_text(encoding="utf-8") == reference(), "run: python -m llmkit.cli_docs"


def test_every_command_and_every_exit_code_is_on_the_page() -> None:
    from llmkit import errors

    text = reference()
    for name in [*STAGES, "run", "init", "doctor", "export-schema", "chat", "merge", "sync"]:
        assert f"\n## llmkit {name}\n" in text
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    for code in codes | {0, 130}:
        assert f"\n| {code} | " in text
