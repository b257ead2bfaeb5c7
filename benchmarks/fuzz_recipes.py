"""Damaged recipes: whatever a recipe file holds, llmkit reads it or says what is wrong with it.

    python benchmarks/fuzz_recipes.py [--examples 2600] [--commands 40] [--seed 0]

Hypothesis makes the recipes: a valid one changed in its structure (keys dropped, misspelt, moved; values of other
types), a valid one changed in its text (characters, lines, indentation), fragments of YAML, and raw bytes; some come
with overrides. In process, each must give a recipe that survives dump and load, or a RecipeError with a place and a
message for every problem, in under 5 seconds. A sample goes through the real command line, which must end with 0 or 2,
in agreement with the result in process, and without a traceback. Writes benchmarks/results/fuzz_recipes-<date>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from llmkit.errors import RecipeError
from llmkit.foreign_keys import FOREIGN_KEYS
from llmkit.recipe import dump, load_recipe
from llmkit.stages import sft

REPO = Path(__file__).resolve().parent.parent
SLOW_SECONDS = 5.0

VALID = """\
name: fuzzed
seed: 0
model: {name_or_path: models/smollm2-135m-instruct, dtype: bfloat16}
data:
  train: [&a {path: data/a.jsonl, weight: 2}, {<<: *a, path: data/b.jsonl}, data/c.jsonl]
  eval: {split: 0.02}
  format: prompt_completion
  columns: {prompt: question, completion: answer}
  system: "Answer: briefly"  # a comment
  max_length: 512
  packing: true
train:
  num_train_epochs: 1
  learning_rate: 2e-5
  eval_steps: 50
  save_steps: 50
tracking:
  experiment: x
  tags: {a: "1"}
"""

_KEYS = (
    st.sampled_from(sorted(FOREIGN_KEYS)) | st.text(max_size=8) | st.sampled_from(["train", "data", "path", "0", "<<"])
)
_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates()
    | st.sampled_from([10**500, -1, 0, "", "8", "auto", "${X}", "~/x", "hf_" + "a" * 30, "a://b:c@d", "\x85", "*", "{", "1e-5"])
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(_KEYS, v, max_size=3), max_leaves=5
)
_SNIPPETS = st.sampled_from(
    ["\t", ":", ": ", "- ", "[", "]", "{", "}", "&a", "*a", "*b", "!!int ", "!x ", "'", '"', "|", ">", "#", "%", "@", "`", "?", "\n",
     "---\n", "...\n", "<<: *a\n", "\r", "\0", "\x85", "\ufeff", "\ud7ff", "é", "한", "  ", "name: b\n", "null", "1e999", ".nan"]
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    kind: str
    content: bytes
    overrides: tuple[str, ...] = ()


def _walk(value: Any) -> list[Any]:
    """Every mapping and list in a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if isinstance(value, (dict, list)) else []) + [found for item in inner for found in _walk(item)]


@st.composite
def structural(draw: st.DrawFn) -> Case:
    """A valid recipe with keys dropped, renamed, added and moved, and values replaced."""
    data = copy.deepcopy(yaml.safe_load(VALID))
    for _ in range(draw(st.integers(1, 4))):
        places = [place for place in _walk(data) if place]
        if not places:
            break
        holder = draw(st.sampled_from(places))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw(st.sampled_from(keys))
        change = draw(st.sampled_from(["drop", "rename", "replace", "add", "wrap", "move", "misspell"]))
        if change == "drop":
            del holder[key]
        elif change == "replace":
            holder[key] = draw(_VALUES)
        elif change == "wrap":
            holder[key] = [holder[key]]
        elif isinstance(holder, dict):
            value = draw(_VALUES) if change == "add" else holder[key]
            if change in ("rename", "misspell", "move"):
                del holder[key]
            if change == "misspell" and isinstance(key, str) and key:
                cut = draw(st.integers(0, len(key) - 1))
                holder[key[:cut] + key[cut + 1 :]] = value
            elif change == "move" and isinstance(data, dict):
                data[key] = copy.deepcopy(value)
            else:
                holder[draw(_KEYS)] = value
    text = yaml.dump(data, Dumper=_Plain, allow_unicode=True, default_flow_style=draw(st.booleans()), sort_keys=False)
    return Case("structure", text.encode("utf-8", "surrogatepass"))


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@st.composite
def textual(draw: st.DrawFn) -> Case:
    """A valid recipe with characters and lines inserted, deleted, doubled, or cut off."""
    text = VALID
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        end = min(len(text), at + draw(st.integers(0, 6)))
        change = draw(st.sampled_from(["insert", "delete", "double", "cut", "indent"]))
        if change == "insert":
            text = text[:at] + draw(_SNIPPETS | st.text(max_size=3)) + text[at:]
        elif change == "delete":
            text = text[:at] + text[end:]
        elif change == "double":
            lines = text.splitlines(keepends=True) or [""]
            line = draw(st.integers(0, len(lines) - 1))
            text = "".join([*lines[: line + 1], lines[line], *lines[line + 1 :]])
        elif change == "cut":
            text = text[: max(at, 1)]
        else:
            text = text[:at].rpartition("\n")[0] + "\n " + text[at:]
    return Case("text", text.encode("utf-8", "surrogatepass"))


_fragments = st.lists(_SNIPPETS | _KEYS | st.integers().map(str), max_size=30).map("".join)
_overrides = st.lists(
    st.text(max_size=10)
    | st.builds(
        "{}={}".format,
        st.sampled_from(
            ["train.max_steps", "data.train.0.path", "data.eval", "name", "name.x", "data.train.9", "a..b", "tracking"]
        ),
        _fragments | st.sampled_from(["1e-5", "", "{split: 0.1}", "[a, b]", "a: b: c"]),
    ),
    min_size=1,
    max_size=3,
).map(tuple)


def cases() -> st.SearchStrategy[Case]:
    raw = st.binary(max_size=60).map(lambda content: Case("bytes", content))
    mixed = st.builds(
        lambda content, at: Case("bytes", VALID.encode()[:at] + content + VALID.encode()[at:]),
        st.binary(min_size=1, max_size=8),
        st.integers(0, len(VALID)),
    )
    fragments = _fragments.map(lambda text: Case("fragments", text.encode("utf-8", "surrogatepass")))
    overridden = _overrides.map(lambda overrides: Case("overrides", VALID.encode(), overrides))
    return structural() | structural() | textual() | textual() | fragments | raw | mixed | overridden


def outcome(case: Case, path: Path) -> str:
    """``valid`` or ``refused``. Raises AssertionError when neither is done well, or what llmkit let through."""
    path.write_bytes(case.content)
    began = time.perf_counter()
    try:
        recipe = load_recipe(path, sft.Recipe, case.overrides)
    except RecipeError as error:
        assert error.problems, "an error without a problem"
        for problem in error.problems:
            assert problem.where and problem.message, f"a problem without place or message: {problem!r}"
            assert "\ud800" not in str(problem)
            str(problem).encode()
        assert ("hf_" + "a" * 30) not in str(error), "a secret in a message"
        result = "refused"
    else:
        path.write_text(dump(recipe), encoding="utf-8")
        assert load_recipe(path, sft.Recipe) == recipe, "not the same after dump and load"
        path.write_bytes(case.content)
        result = "valid"
    assert time.perf_counter() - began < SLOW_SECONDS, "too slow"
    return result


def explore(examples: int, number: int, see: Callable[[Case], None]) -> None:
    """Call ``see`` with ``examples`` different cases, the same ones for the same ``number``."""

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def look(case: Case) -> None:
        see(case)

    look()


def command(case: Case, expected: str, folder: Path, number: int) -> str | None:
    """Run the real command line on a case; None when all is well, else what was wrong."""
    path = folder / f"case{number}.yaml"
    path.write_bytes(case.content)
    # A lone surrogate or NUL cannot be an argument of a process.
    if any("\0" in text for text in case.overrides):
        return None
    argv = [
        sys.executable,
        "-m",
        "llmkit",
        "sft",
        str(path),
        "--dry-run",
        *(f"--set={text}" for text in case.overrides),
    ]
    done = subprocess.run(argv, capture_output=True, cwd=REPO, check=False, timeout=120)
    said = (done.stdout + done.stderr).decode(errors="replace")
    wanted = 0 if expected == "valid" else 2
    if "Traceback" in said or done.returncode != wanted:
        return f"exit code {done.returncode}, {wanted} expected: {said[-600:]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2600)
    parser.add_argument("--commands", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds: Counter[str] = Counter()
    faults: list[str] = []
    seen: list[tuple[Case, str]] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"

        def see(case: Case) -> None:
            try:
                result = outcome(case, path)
            except Exception as error:  # noqa: BLE001  a fault of any kind is what is looked for
                faults.append(f"{type(error).__name__}: {error} in {case!r}")
                result = "FAULT"
            kinds[f"{case.kind}: {result}"] += 1
            seen.append((case, result))

        explore(options.examples, options.seed, see)
        in_process = time.perf_counter() - began
        sample = _sample([pair for pair in seen if pair[1] != "FAULT"], options.commands)
        with ThreadPoolExecutor(2) as pool:
            folders = [Path(folder)] * len(sample)
            said = list(pool.map(command, *zip(*sample, strict=True), folders, range(len(sample)))) if sample else []
    wrong = [text for text in said if text]
    from common import machine, write_result

    report = {
        "machine": machine("pydantic", "PyYAML"),
        "seed": options.seed,
        "examples": len(seen),
        "different": len({(case.content, case.overrides) for case, _ in seen}),
        "outcomes": dict(sorted(kinds.items())),
        "faults": faults,
        "seconds_in_process": round(in_process, 1),
        "commands": len(sample),
        "commands_valid": sum(result == "valid" for _, result in sample),
        "commands_wrong": wrong,
    }
    write_result("fuzz_recipes", report)
    print(json.dumps(report, indent=2, ensure_ascii=False))
    return 1 if faults or wrong or len(seen) < options.examples else 0


def _sample(pairs: list[tuple[Case, str]], size: int) -> list[tuple[Case, str]]:
    """An even sample, a quarter of it valid recipes where there are so many."""
    valid = [pair for pair in pairs if pair[1] == "valid"][: size // 4]
    refused = [pair for pair in pairs if pair[1] == "refused"]
    step = max(1, len(refused) // max(1, size - len(valid)))
    return valid + refused[::step][: size - len(valid)]


if __name__ == "__main__":
    sys.exit(main())
