"""Documents that cannot rot: links lead somewhere, quoted recipes are valid, named commands exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from llmkit import stages
from llmkit.recipe import load_recipe

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md")])
IDS = [str(page.relative_to(REPO)) for page in PAGES]


def test_there_are_documents() -> None:
    assert {"README.md", "CHANGELOG.md", "docs/index.md", "docs/data.md", "docs/recipe-reference.md"} <= set(IDS)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_guide_is_on_the_index() -> None:
    index = (REPO / "docs/index.md").read_text(encoding="utf-8")
    for page in REPO.glob("docs/**/*.md"):
        name = str(page.relative_to(REPO / "docs"))
        assert name == "index.md" or f"({name})" in index, f"docs/index.md does not link {name}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_quoted_recipes_are_valid(page: Path, tmp_path: Path) -> None:
    """A yaml block with ``output_dir:`` is a whole recipe; with ``adapter:`` it is one of ``llmkit lora``."""
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
        if not re.search(r"^output_dir:", block, re.MULTILINE):
            continue
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        stage = "lora" if re.search(r"^adapter:", block, re.MULTILINE) else "sft"
        assert load_recipe(file, stages.load(stage).Recipe).name


def test_commands_in_the_guides_exist(run_llmkit) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name != "decisions")
    commands = set(re.findall(r"^(?:\.venv/bin/)?llmkit ([a-z][a-z-]+)", text, re.MULTILINE))
    assert len(commands) >= 4
    shown = run_llmkit("--help").stdout
    for command in commands:
        assert re.search(rf"\b{command}\b", shown), f"llmkit {command} is in a guide, but not in llmkit --help"


def test_no_committed_file_names_a_machine_or_an_index() -> None:
    files = (
        subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True).stdout.decode().split("\0")
    )
    pattern = re.compile(r"(^|[^\w.-])/(work|farm|root)/|pypi\." + "org", re.MULTILINE)
    seen = 0
    for name in filter(None, files):
        path = REPO / name
        if path.suffix in {".png", ".parquet", ".arrow", ".gz"} or not path.is_file():
            continue
        seen += 1
        match = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
        assert match is None, f"{name}: {match and match[0]}"
    assert seen > 30
