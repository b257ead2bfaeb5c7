"""Texts for benchmarks/embed_throughput.py: four kinds of load out of ../shared/data, the same at every run."""

from __future__ import annotations

import csv
import json
import random

from common import REPO

DATA = REPO.parent / "shared" / "data"
PROMPT = (
    "Instruct: Given a question that a customer asks a bank, retrieve questions of other customers that have the same "
    "intent and are answered in the same way\nQuery: "
)


def _banking() -> list[str]:
    with (DATA / "banking77" / "train.csv").open(encoding="utf-8", newline="") as stream:
        return list(dict.fromkeys(row["text"] for row in csv.DictReader(stream)))


def _gsm8k() -> list[dict[str, str]]:
    lines = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def loads(count: int, seed: int = 0) -> dict[str, list[str]]:
    """``count`` texts of each kind.

    uniform: questions to a bank (Banking77), all different. skewed: 80 % of them, 15 % GSM8K questions, 5 % questions
    with their solutions. duplicates: 30 % of the rows are repetitions of others. prefix: all begin with one instruction.
    """
    drawn = random.Random(seed)
    short = drawn.sample(_banking(), count)
    problems = drawn.sample(_gsm8k(), count)
    middle, long = int(0.15 * count), int(0.05 * count)
    skewed = [
        *short[: count - middle - long],
        *(row["question"] for row in problems[:middle]),
        *(f"{row['question']}\n{row['answer']}" for row in problems[middle : middle + long]),
    ]
    kept = count - int(0.3 * count)
    duplicates = short[:kept] + drawn.choices(short[:kept], k=count - kept)
    for mixed in (skewed, duplicates):
        drawn.shuffle(mixed)
    return {"uniform": short, "skewed": skewed, "duplicates": duplicates, "prefix": [PROMPT + text for text in short]}


def sts(language: str) -> tuple[list[str], list[str], list[float]]:
    """Both sentences of each pair of STS-B's test part, and how like a person found them (0 to 5)."""
    with (DATA / "stsb" / f"{language}-test.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    return [row[0] for row in rows], [row[1] for row in rows], [float(row[2]) for row in rows]
