"""The privacy filter of ``data.guard``: recall, precision and speed on planted personal data and hard negatives, beside Presidio.

    python benchmarks/guard.py [--per-kind 5000] [--seed 1] [--presidio /path/to/python] [--show 0]

benchmarks/guard_data.py makes the rows without any code of the detectors. A planted value is found when a finding of its
kind has exactly its place; every finding that touches no planted value of its kind is a false one. Each kind is held
against all rows: as many hard negatives as planted values, and the planted values of the other kinds.

``--presidio`` is a Python that has presidio-analyzer (its dependencies clash with llmkit's): its pattern recognizers run
on a blank spaCy model, with phone regions as ours, on the same rows. Writes benchmarks/results/guard-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import guard_data
from common import REPO, machine, write_result
from guard_data import Case

Found = list[tuple[str, int, int]]
GSM8K = REPO.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
MIX = 20  # one row in so many has something planted in the throughput on ordinary text


def score(cases: list[Case], found: list[Found], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Recall and precision of each kind over all rows."""
    planted, exact, touched, false = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    false_in: dict[str, Counter[str]] = defaultdict(Counter)
    for case, findings in zip(cases, found, strict=True):
        if case.kind:
            planted[case.kind] += 1
        mine = [f for f in findings if f[0] == case.kind and f[1] < case.end and case.start < f[2]]
        exact[case.kind] += any(f[1:] == (case.start, case.end) for f in mine)
        touched[case.kind] += bool(mine)
        for finding in findings:
            if finding not in mine:
                false[finding[0]] += 1
                false_in[finding[0]][case.kind or case.category] += 1
    return {
        kind: {
            "planted": planted[kind],
            "recall": round(exact[kind] / planted[kind], 5),
            "recall_touched": round(touched[kind] / planted[kind], 5),
            "precision": round(touched[kind] / max(1, touched[kind] + false[kind]), 5),
            "false": false[kind],
            "false_in": dict(false_in[kind].most_common(6)),
        }
        for kind in kinds
    }


def ours(texts: list[str]) -> tuple[list[Found], float]:
    from llmkit.data.guard.privacy import PrivacyFilter

    guard = PrivacyFilter()
    guard.find("010-2345-6789 warm up +1 212 456 7890")
    start = time.process_time()
    found = [guard.find(text) for text in texts]
    seconds = time.process_time() - start
    return [[(f.kind, f.start, f.end) for f in findings] for findings in found], seconds


PRESIDIO = """
import json, sys, time, spacy
from presidio_analyzer import AnalyzerEngine
from presidio_analyzer.nlp_engine import SpacyNlpEngine
from presidio_analyzer.predefined_recognizers import PhoneRecognizer

class Blank(SpacyNlpEngine):
    def __init__(self):
        super().__init__()
        self.nlp = {"en": spacy.blank("en")}
    def load(self):
        pass

KINDS = {"EMAIL_ADDRESS": "email", "PHONE_NUMBER": "phone", "CREDIT_CARD": "card", "IBAN_CODE": "iban", "US_SSN": "us_ssn", "IP_ADDRESS": "ip", "KR_RRN": "kr_rrn"}
engine = AnalyzerEngine(nlp_engine=Blank(), supported_languages=["en"])
engine.registry.remove_recognizer("PhoneRecognizer")
engine.registry.add_recognizer(PhoneRecognizer(supported_regions=("KR", "CN", "TW", "JP", "US")))
try:
    from presidio_analyzer.predefined_recognizers import KrRrnRecognizer
    engine.registry.add_recognizer(KrRrnRecognizer(supported_language="en"))
except ImportError:
    pass
known = set(engine.get_supported_entities("en"))
wanted = [name for name in KINDS if name in known]
texts = json.load(open(sys.argv[1]))
engine.analyze(texts[0], "en", entities=wanted)
start = time.process_time()
found = [engine.analyze(text, "en", entities=wanted) for text in texts]
seconds = time.process_time() - start
rows = [[(KINDS[r.entity_type], r.start, r.end) for r in results if r.score >= 0.3] for results in found]
from importlib.metadata import version
json.dump({"found": rows, "seconds": seconds, "kinds": [KINDS[n] for n in wanted], "version": version("presidio-analyzer"), "spacy": spacy.__version__}, open(sys.argv[2], "w"))
"""


def presidio(python: str, texts: list[str]) -> dict[str, Any]:
    """Findings (score of at least 0.3) and seconds of Presidio's pattern recognizers in another Python."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "texts.json", Path(folder) / "found.json"
        source.write_text(json.dumps(texts), encoding="utf-8")
        subprocess.run([python, "-c", PRESIDIO, str(source), str(target)], check=True)
        result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    result["found"] = [[tuple(finding) for finding in row] for row in result["found"]]
    return result


def ordinary(count: int, dense: list[Case]) -> list[str]:
    """Rows of a maths data set (numbers everywhere), every twentieth with something planted or a hard negative after it."""
    if GSM8K.exists():
        lines = GSM8K.read_text(encoding="utf-8").splitlines()
        clean = [" ".join(json.loads(line).values()) for line in lines]
    else:
        clean = [" ".join(sentences) * 4 for sentences in guard_data.FILLER.values()]
    rows = [clean[at % len(clean)] for at in range(count)]
    for at in range(0, count, MIX):
        rows[at] += " " + dense[at % len(dense)].text
    return rows


def show(cases: list[Case], found: list[Found], count: int) -> None:
    """Print what went wrong, some of each kind."""
    seen: Counter[str] = Counter()
    for case, findings in zip(cases, found, strict=True):
        right = [f for f in findings if f[0] == case.kind and f[1:] == (case.start, case.end)]
        for what in ([f"missed {case.kind}"] if case.kind and not right else []) + [
            f"false {f[0]} in {case.kind or case.category}" for f in findings if f not in right
        ]:
            seen[what] += 1
            if seen[what] <= count:
                print(f"  {what}: {case.text!r} {findings} [{case.start}, {case.end}]")
    for what, times in seen.most_common():
        print(f"{times:6} {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-kind", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--presidio", help="a Python that has presidio-analyzer")
    parser.add_argument("--presidio-rows", type=int, default=20000, help="rows that Presidio gets, an even sample")
    parser.add_argument(
        "--show", type=int, default=0, help="print so many mistakes of each sort instead of writing a result"
    )
    args = parser.parse_args()
    kinds = guard_data.KINDS
    cases = [case for kind in kinds for case in guard_data.planted(kind, args.per_kind, args.seed)]
    cases += guard_data.negatives(args.per_kind * len(kinds), args.seed)
    few = args.per_kind // 5
    unseen = [case for kind in kinds for case in guard_data.unseen(kind, few, args.seed)]
    unseen += guard_data.unseen("", few * len(kinds), args.seed)
    found, seconds = ours([case.text for case in cases])
    if args.show:
        show(cases, found, args.show)
    result: dict[str, Any] = {
        "benchmark": "guard",
        "machine": machine("phonenumbers"),
        "seed": args.seed,
        "rows": {"planted": args.per_kind * len(kinds), "hard_negatives": args.per_kind * len(kinds)},
        "quality": score(cases, found, kinds),
        "by_label": {
            label: {k: v["recall"] for k, v in score([c for c, _ in pairs], [f for _, f in pairs], kinds).items()}
            for label in ("labelled", "unlabelled")
            if (pairs := [(c, f) for c, f in zip(cases, found, strict=True) if c.category == label])
        },
        "quality_unseen_sentences": score(unseen, ours([case.text for case in unseen])[0], kinds),
        "speed": {"dense_rows_per_s": round(len(cases) / seconds)},
    }
    rows = ordinary(len(cases) // 5, cases)
    _, mixed = ours(rows)
    result["speed"] |= {
        "ordinary_rows_per_s": round(len(rows) / mixed),
        "ordinary_characters_a_row": round(sum(map(len, rows)) / len(rows)),
        "ordinary_planted": f"1 row in {MIX}",
    }
    if args.presidio:
        result["presidio"] = beside(args.presidio, cases, rows, args.presidio_rows)
    for part in ("quality", "quality_unseen_sentences"):
        print(part)
        for kind, row in result[part].items():
            print(
                f"{kind:8} recall {row['recall']:.4f} precision {row['precision']:.4f} false {row['false']} {row['false_in']}"
            )
    print(json.dumps(result["speed"]))
    if not args.show:
        write_result("guard", result)


def beside(python: str, cases: list[Case], ordinary_rows: list[str], count: int) -> dict[str, Any]:
    """Presidio and we on the same sample: quality of the kinds that both have, and speed."""
    sample = cases[:: max(1, len(cases) // count)]
    theirs = presidio(python, [case.text for case in sample])
    found, seconds = ours([case.text for case in sample])
    few = ordinary_rows[:: max(1, len(ordinary_rows) // (count // 10))]
    kinds = tuple(kind for kind in guard_data.KINDS if kind in theirs["kinds"])
    mine = [[f for f in row if f[0] in kinds] for row in found]
    english = [at for at, case in enumerate(sample) if case.language == "en"]
    ours_few = ours(few)[1]
    theirs_few = presidio(python, few)["seconds"]
    return {
        "version": theirs["version"],
        "set_up": f"pattern recognizers, spaCy {theirs['spacy']} blank English model (no model could be downloaded), score >= 0.3",
        "rows": len(sample),
        "quality": score(sample, theirs["found"], kinds),
        "quality_llmkit": score(sample, mine, kinds),
        "quality_english": score([sample[at] for at in english], [theirs["found"][at] for at in english], kinds),
        "quality_english_llmkit": score([sample[at] for at in english], [mine[at] for at in english], kinds),
        "read_with_care": "private IP addresses and service numbers are no findings by llmkit's rules and are by Presidio's;"
        " its word boundaries are made for text with spaces",
        "dense_rows_per_s": round(len(sample) / theirs["seconds"], 1),
        "dense_rows_per_s_llmkit": round(len(sample) / seconds, 1),
        "ordinary_rows_per_s": round(len(few) / theirs_few, 1),
        "ordinary_rows_per_s_llmkit": round(len(few) / ours_few, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
