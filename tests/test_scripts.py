"""The scripts: training text that is the same everywhere, errors that say what to do, skips that cannot hide."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False, timeout=120
    )


# --- training text --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "docs"
    done = run(sys.executable, REPO / "scripts/make_docs_corpus.py", "--out", out, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


def test_questions_are_many_distinct_and_answered_shortly(corpus: Path) -> None:
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 1500 <= len(rows) <= 5000
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert len({row["completion"].casefold() for row in rows}) == len(rows)
    assert all(30 <= len(row["completion"]) <= 650 for row in rows)
    assert any("json.dumps" in row["prompt"] for row in rows)


def test_text_is_cut_between_paragraphs(corpus: Path) -> None:
    rows = [json.loads(line)["text"] for line in (corpus / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 200
    assert all(text == text.strip() and len(text) >= 30 for text in rows)


def test_the_same_python_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    done = run(
        sys.executable, REPO / "scripts/make_docs_corpus.py", "--out", tmp_path, cwd=tmp_path, PYTHONHASHSEED="7"
    )
    assert done.returncode == 0
    for name in ("train.jsonl", "text.jsonl"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_a_second_run_keeps_what_is_there(corpus: Path) -> None:
    before = (corpus / "train.jsonl").stat().st_mtime_ns
    done = run(sys.executable, REPO / "scripts/make_docs_corpus.py", "--out", corpus, cwd=corpus)
    assert "there already" in done.stdout
    assert (corpus / "train.jsonl").stat().st_mtime_ns == before


# --- the demo model -------------------------------------------------------------------------------------------------


def test_the_demo_model_is_kept_when_complete_and_refused_when_not(demo_model: Path, tmp_path: Path) -> None:
    script = REPO / "scripts/fetch_demo_model.py"
    assert "there already" in run(sys.executable, script, "--out", demo_model, cwd=tmp_path).stdout
    (tmp_path / "half").mkdir()
    done = run(sys.executable, script, "--out", tmp_path / "half", cwd=tmp_path)
    assert done.returncode == 2
    assert "not a complete model" in done.stderr


def test_the_demo_model_ends_its_turn(demo_model: Path) -> None:
    config = json.loads((demo_model / "generation_config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((demo_model / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert config["eos_token_id"] == ids["<|im_end|>"]
    assert (demo_model / "chat_template.jinja").read_text(encoding="utf-8").count("<|im_end|>") >= 1


# --- setting up -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout without .venv: what a stranger has."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPO / "scripts/setup.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "env", "code", "says"),
    [
        ([], {"LLMKIT_PYTHON": "python-that-is-not-there"}, 6, "LLMKIT_PYTHON=/path/to/python3.11"),
        ([], {"LLMKIT_TORCH": "tpu"}, 2, "cpu, cuda or auto"),
        (["--devv"], {}, 2, "usage: scripts/setup.sh [--dev]"),
    ],
)
def test_setup_says_what_is_wrong(bare: Path, arguments: list[str], env: dict[str, str], code: int, says: str) -> None:
    done = run("bash", "scripts/setup.sh", *arguments, cwd=bare, **env)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_setup_refuses_a_disk_that_is_too_full(bare: Path) -> None:
    fake = bare / "bin"
    fake.mkdir()
    (fake / "df").write_text('#!/bin/sh\nprintf "head\\n/dev/x 9 9 3145728 1%% /\\n"\n', encoding="utf-8")
    (fake / "df").chmod(0o755)
    done = run("bash", "scripts/setup.sh", cwd=bare, PATH=f"{fake}:{os.environ['PATH']}", LLMKIT_TORCH="cpu")
    assert done.returncode == 5
    assert "needs 6 GB free here, 3 GB are" in done.stderr


def test_setup_says_when_the_package_index_is_away(bare: Path) -> None:
    env = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    away = env | {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "LLMKIT_TORCH": "cpu"}
    done = run("bash", "scripts/setup.sh", cwd=bare, **away)
    assert done.returncode == 6
    assert "could not reach its package index" in done.stderr
    assert not list((bare / ".venv").glob("llmkit-setup.*")), "a set-up that failed must be tried again"


# --- a run of the suite that can be trusted -------------------------------------------------------------------------


def test_on_ci_a_skip_for_an_unknown_reason_fails(tmp_path: Path) -> None:
    (tmp_path / "test_skips.py").write_text(
        "import pytest\n"
        "def test_fine(): pytest.skip('no GPU on this machine')\n"
        "def test_hidden(): pytest.skip('the fixture is broken')\n",
        encoding="utf-8",
    )
    arguments = ["-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    on_ci = run(sys.executable, *arguments, cwd=tmp_path, CI="true", PYTHONPATH=str(REPO / "tests"))
    assert "1 failed, 1 skipped" in on_ci.stdout, on_ci.stdout + on_ci.stderr
    assert "the fixture is broken" in on_ci.stdout
    at_home = run(sys.executable, *arguments, cwd=tmp_path, CI="", PYTHONPATH=str(REPO / "tests"))
    assert "2 skipped" in at_home.stdout
