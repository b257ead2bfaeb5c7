"""Files that are no recipes: one message with line and column, whatever the bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_texts import mistakes, of_data, small

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "r.yaml:1:1: the recipe is empty\n    `llmkit init STAGE` writes one to start from"),
        (b"# only a comment\n", "r.yaml:1:1: the recipe is empty\n    `llmkit init STAGE` writes one to start from"),
        (b"- a\n- b\n", "r.yaml:1:1: a recipe is a mapping of keys to values, this is a list\n    is it a data file?"),
        (b"hello\n", "r.yaml:1:1: a recipe is a mapping of keys to values, this is a single value"),
        (b"name: a\n\tseed: 1\n", "r.yaml:2:1: a tab; YAML is indented with spaces"),
        (b"name: a: b\n", "r.yaml:1:8: `: ` is not allowed here\n    quote text that holds `: `, and check the indentation"),
        (b"a: [1, 2\nb: 3\n", "r.yaml:2:2: a bracket or brace is not closed, or a comma is missing\n    it belongs to what begins in line 1"),
        (b'a: "x\nb: 3\n', "r.yaml:3:1: a quote is not closed\n    it belongs to what begins in line 1"),
        (b"a: *x\n", "r.yaml:1:4: `*name` refers to an anchor that is not defined\n    put text that begins with `*` in quotes"),
        (b"a: *.jsonl\n", "r.yaml:1:5: `*` and `&` mean anchors in YAML\n    put text that begins with them in quotes"),
        (b"a: @x\n", "r.yaml:1:4: this character cannot begin a value\n    put the text in quotes"),
        (b"name: a\nseed: 1\n  x: 2\n", "r.yaml:3:4: `: ` is not allowed here\n    quote text that holds `: `, and check the indentation"),
        (b"name: a\n---\nname: b\n", "r.yaml:2:1: a second YAML document (`---`)\n    a recipe is one document"),
        (b"name: caf\xe9\n", "r.yaml:1:10: not UTF-8: byte 0xe9\n    save the file as UTF-8"),
        ("name: 한\n".encode() + b"x: \xff\n", "r.yaml:2:4: not UTF-8: byte 0xff\n    save the file as UTF-8"),
        (b"name: a\nx: a\x00b\n", "r.yaml:2:5: a character that YAML does not allow"),
        (b"a: &a [*a]\n", "r.yaml:1:4: an anchor that contains itself"),
        (b"a: &a {b: *a}\n", "r.yaml:1:4: an anchor that contains itself"),
        (b"a: &a {<<: *a}\n", "r.yaml:1:4: an anchor that contains itself"),
        (b"a: " + b"[" * 5000, "r.yaml:1:43: blocks are nested more than 40 deep"),
        (LAUGHS.encode(), "r.yaml:1:4: more than 50,000 values when aliases (`*name`) are written out"),
        (b"x" * 300_000, "r.yaml: is larger than 256 KiB, too large for a recipe\n    is it a data file?"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_one_message(write_recipe: Callable[[bytes], str], text: bytes, message: str) -> None:
    began = time.perf_counter()
    found = mistakes(write_recipe(text))
    assert len(found) == 1
    where, _, rest = found[0].partition(": ")
    expected_where, _, expected = message.partition(": ")
    assert rest == expected
    if "50,000" not in message:
        assert where == expected_where
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name: a", "name: given twice, first at r.yaml:1:1\n    keep one of them"),
        ("1: x", 'the key 1 must be text\n    write "1"'),
        ("? [a]\n: x", "a key must be text\n    put text that begins with `{` or `[` in quotes"),
        ("seed: !!python/object/apply:os.system [x]", "seed: the tag !!python/object/apply:os.system is not known in a recipe"),
        ("seed: !!int x", "seed: !!int cannot be written like that"),
        ("seed: " + "9" * 5000, "seed: a number of more than 400 digits"),
        ("<<: 3", "`<<` merges a mapping or a list of mappings"),
    ],
)  # fmt: skip
def test_mistakes_after_which_reading_goes_on(write_recipe: Callable[[str], str], line: str, message: str) -> None:
    found = mistakes(write_recipe(f"name: a\nmodel: {{name_or_path: m}}\n{line}\ndata: {{train: 3}}\n"))
    assert any(problem.startswith("r.yaml:3:") and problem.endswith(message) for problem in found), found
    assert any("data.train: expected" in problem for problem in found)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes/sft").mkdir(parents=True)
    Path("recipes/sft/quick.yaml").write_text("name: a\n")
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("name: a\n")
    assert mistakes("recipes/sft/quik.yaml") == [
        "recipes/sft/quik.yaml: there is no such file\n    did you mean recipes/sft/quick.yaml?"
    ]
    assert mistakes("quick.yaml") == ["quick.yaml: there is no such file\n    did you mean recipes/sft/quick.yaml?"]
    assert mistakes("no/x.yaml") == ["no/x.yaml: there is no such file\n    there is no folder no"]
    assert mistakes("run") == ["run: is a folder, not a recipe\n    did you mean run/recipe.yaml?"]
    assert mistakes("x" * 5000)[0].endswith("cannot be read: File name too long")
    assert mistakes("a\0b")[0].endswith("embedded null byte")
    assert "cannot be read" in mistakes("run/recipe.yaml/x")[0]
    assert "too large" in mistakes("/dev/zero")[0]


def test_an_unreadable_file_is_one_message(write_recipe: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe("name: a\n")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no file mode keeps out
    assert mistakes(path) == ["r.yaml: cannot be read: Permission denied"]


def test_thousands_of_mistakes_are_a_hundred_and_a_count(write_recipe: Callable[[str], str]) -> None:
    began = time.perf_counter()
    found = mistakes(write_recipe("".join(f"trian{i}: 1\n" for i in range(15_000))))
    assert len(found) == 101
    assert found[-1] == "r.yaml: and 14,903 more mistakes"
    assert time.perf_counter() - began < 10


def test_keys_in_messages_are_printable_and_short(write_recipe: Callable[[str], str]) -> None:
    found = mistakes(write_recipe('"\\e[31m\\n": 1\n' + f"{'k' * 500}: 1\n{'hf_' + 'a' * 30}: 1\n" + "name: a\n"))
    text = "\n".join(found)
    assert r"r.yaml:1:1: \x1b[31m\n: unknown key" in text
    assert f"r.yaml:2:1: {'k' * 117}...: unknown key" in text
    assert "r.yaml:3:1: ***: unknown key" in text


def test_python_data_that_is_no_recipe() -> None:
    nested: dict[str, Any] = {}
    nested["x"] = nested
    assert "nested more than" in of_data(nested)[0]
    assert (
        "train.max_steps: expected a whole number of at least -1, got a set"
        in of_data(small(train={"max_steps": {1}}))[0]
    )
