"""The guard on many rows: time, rows a second and peak memory; near duplicates against exact Jaccard and datasketch.

    python benchmarks/guard_scale.py [--rows 1000000] [--sample 4000] [--against 20000] [--folder DIR]

Rows are generated (seeded, not kept): English, Korean and Chinese questions and answers of a shop, some of them copies,
near copies and test rows, some with personal data. Each part runs in a process of its own:

- everything at once, as ``llmkit check-data`` does, and duplicates with leaks, and personal data, each alone;
- accuracy: of all pairs of a sample whose true Jaccard similarity reaches the threshold, the share that ended in one
  cluster (recall), and of the pairs in one cluster the share that the true graph connects (precision);
- datasketch (MinHash and MinHashLSH, 128 permutations) on the same shingles of the same rows, in one process each,
  with its default hash (SHA-1) and with xxhash.

Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Quiet, machine, write_result

THRESHOLD, PERMUTATIONS = 0.8, 128
PARTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "duplicates and leaks": {"privacy": None, "quality": None, "contradictions": None},
    "privacy": {"duplicates": None, "leaks": None, "quality": None, "contradictions": None},
}
_LETTERS = {
    "en": "abcdefghijklmnopqrstuvwxyz",
    "ko": "가나다라마바사아자차카타파하고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후기니디리미비시이지치키티피히",
    "zh": "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所",
}
_OPENING = {"en": "Answer the customer's question. ", "ko": "고객의 질문에 답하세요. ", "zh": "请回答顾客的问题。"}


def vocabulary(language: str, random_: random.Random) -> list[str]:
    sizes = {"en": (2, 9), "ko": (2, 4), "zh": (1, 3)}[language]
    return ["".join(random_.choices(_LETTERS[language], k=random_.randint(*sizes))) for _ in range(8_000)]


def text(language: str, words: list[str], count: int, random_: random.Random) -> str:
    """Words by a falling frequency, as in real text."""
    chosen = [words[int(len(words) * random_.random() ** 2)] for _ in range(count)]
    return ("" if language == "zh" else " ").join(chosen)


def rows(count: int, tests: list[dict[str, str]], seed: int = 0) -> Iterator[dict[str, str]]:
    """Training rows: 3 % copies, 5 % near copies of earlier ones, 1 % with an e-mail address, every 10th test row once."""
    random_ = random.Random(seed)
    words = {language: vocabulary(language, random_) for language in _LETTERS}
    earlier: list[dict[str, str]] = []
    leaked = {random_.randrange(count): test for test in tests[::10]}
    for number in range(count):
        kind = random_.random()
        if number in leaked:
            row = leaked[number]
        elif earlier and kind < 0.03:
            row = random_.choice(earlier)
        elif earlier and kind < 0.08:
            row = dict(random_.choice(earlier))
            row["completion"] = edited(row["completion"], random_)
        else:
            row = fresh(words, random_)
            if kind > 0.99:
                row["completion"] += f" kim{number}@shop.co.kr"
        if len(earlier) < 20_000:
            earlier.append(row)
        yield row


def fresh(words: dict[str, list[str]], random_: random.Random) -> dict[str, str]:
    language = random_.choice(("en", "ko", "zh"))
    question = text(language, words[language], random_.randint(8, 25), random_)
    answer = text(language, words[language], random_.randint(20, 60), random_)
    return {"prompt": _OPENING[language] + question, "completion": answer}


def edited(answer: str, random_: random.Random) -> str:
    """A few pieces of the answer changed."""
    for _ in range(random_.randint(1, 6)):
        place = random_.randrange(len(answer))
        answer = answer[:place] + random_.choice("가나的一xyz") + answer[place + random_.randint(1, 4) :]
    return answer


def write(folder: Path, count: int) -> None:
    random_ = random.Random(1)
    words = {language: vocabulary(language, random_) for language in _LETTERS}
    tests = [fresh(words, random_) for _ in range(1_000)]
    for name, made in (("test", iter(tests)), ("train", rows(count, tests))):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)


def scale(folder: Path, part: str) -> dict[str, Any]:
    """One pass over the folder's rows with some checks on."""
    from llmkit.data.guard.examine import examine
    from llmkit.data.guard.settings import GuardSettings
    from llmkit.data.guard.workers import processes
    from llmkit.data.settings import DataSettings

    guard = GuardSettings.model_validate(PARTS[part])
    settings = DataSettings(train=str(folder / "train.jsonl"), eval=str(folder / "test.jsonl"), guard=guard)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        begin = time.perf_counter()
        verdict = examine(settings, guard, Path(work) / "work", Path(work) / "out", Quiet())
        seconds = time.perf_counter() - begin
        spent = os.times()
        disk = sum(path.stat().st_size for path in Path(work).rglob("*") if path.is_file())
    report = verdict.report
    found = {name: report[name]["rows"] for name in ("privacy", "leaks", "contradictions") if name in report}
    if "duplicates" in report:
        found |= {f"{kind} duplicates": report["duplicates"][kind]["rows"] for kind in ("exact", "near")}
    return {
        "rows": report["rows"], "seconds": round(seconds, 1), "rows_per_second": round(report["rows"] / seconds),
        "cpu_seconds": round(spent.user + spent.system + spent.children_user + spent.children_system, 1),
        "worker_processes": processes(),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_memory_of_a_worker_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "data_mb": round((folder / "train.jsonl").stat().st_size / 1e6), "temporary_files_mb": round(disk / 1e6),
        "found": found,
    }  # fmt: skip


def sample_texts(folder: Path, count: int) -> list[str]:
    texts = []
    with (folder / "train.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            texts.append(f"{row['prompt']}\n{row['completion']}")
            if len(texts) == count:
                break
    return list(dict.fromkeys(texts))


def ours(texts: list[str]) -> tuple[Any, float]:
    """Labels of clusters, and the seconds from texts to labels."""
    import numpy as np

    from llmkit.data.guard.minhash import Bands, Clusters, MinHasher, join_near
    from llmkit.data.guard.ngrams import jaccard, sets, shingles

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bands = Bands(Path(folder), hasher := MinHasher(THRESHOLD, PERMUTATIONS))
        for start in range(0, len(texts), 1_000):
            bands.append(*hasher(shingles(texts[start : start + 1_000])))

        def similar(pairs: Any) -> Any:
            wanted = np.unique(pairs)
            found = dict(zip(wanted.tolist(), sets(shingles([texts[n] for n in wanted.tolist()])), strict=True))
            return np.array([jaccard(found[a], found[b]) >= THRESHOLD for a, b in pairs.tolist()], bool)

        clusters = Clusters(len(texts))
        join_near(bands, np.arange(len(texts)), THRESHOLD, similar, clusters)
        labels = clusters.labels()
    return labels, time.perf_counter() - begin


def accuracy(folder: Path, count: int) -> dict[str, Any]:
    """Against the true similarity of every pair."""
    import numpy as np
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    from llmkit.data.guard.ngrams import sets, shingles

    texts = sample_texts(folder, count)
    owned = list(sets(shingles(texts)))
    hashes, columns = np.unique(np.concatenate(owned), return_inverse=True)
    sizes = np.array([len(own) for own in owned])
    rows_ = np.repeat(np.arange(len(texts)), sizes)
    matrix = csr_array((np.ones(len(columns), np.float32), (rows_, columns)), shape=(len(texts), len(hashes)))
    shared = (matrix @ matrix.T).tocoo()
    upper = shared.row < shared.col
    a, b, both = shared.row[upper], shared.col[upper], shared.data[upper]
    near = both / (sizes[a] + sizes[b] - both) >= THRESHOLD
    graph = csr_array((np.ones(int(near.sum())), (a[near], b[near])), shape=(len(texts),) * 2)
    truth = connected_components(graph, directed=False)[1]
    labels, _ = ours(texts)
    together = pairs_of(labels)
    right = sum(truth[x] == truth[y] for x, y in together)
    return {
        "rows": len(texts), "pairs": len(texts) * (len(texts) - 1) // 2, "true_pairs": int(near.sum()),
        "recall": float(np.mean(labels[a[near]] == labels[b[near]])),
        "precision": right / len(together) if together else 1.0,
    }  # fmt: skip


def pairs_of(labels: Any) -> list[tuple[int, int]]:
    """All pairs of rows with one label."""
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(row)
    return [(x, y) for group in groups.values() for n, x in enumerate(group) for y in group[n + 1 :]]


def against_datasketch(folder: Path, count: int) -> dict[str, Any]:
    """Both on the same rows, from texts to the pairs; datasketch gets the shingles as llmkit cuts them."""
    from collections.abc import Callable

    import xxhash
    from datasketch import MinHash, MinHashLSH

    texts = sample_texts(folder, count)
    labels, seconds = ours(texts)
    expected = set(pairs_of(labels))
    found: dict[str, Any] = {"rows": len(texts), "llmkit_seconds": round(seconds, 2), "llmkit_pairs": len(expected)}
    hashes: dict[str, dict[str, Callable[[bytes], int]]] = {
        "datasketch": {},
        "datasketch with xxhash": {"hashfunc": xxhash.xxh32_intdigest},
    }
    for name, options in hashes.items():
        begin = time.perf_counter()
        index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
        made = []
        for row, one in enumerate(texts):
            signature = MinHash(num_perm=PERMUTATIONS, **options)
            signature.update_batch([shingle.encode() for shingle in cut(one)])
            index.insert(row, signature)
            made.append(signature)
        pairs = {
            (row, other)
            for row, signature in enumerate(made)
            for other in index.query(signature)
            if other > row and signature.jaccard(made[other]) >= THRESHOLD
        }
        spent = time.perf_counter() - begin
        found[name] = {
            "seconds": round(spent, 2), "times_llmkit": round(spent / seconds, 1), "pairs": len(pairs),
            "of_them_with_llmkit": len(pairs & expected),
        }  # fmt: skip
    return found


def cut(one: str) -> set[str]:
    """The shingles of a text as strings."""
    from llmkit.data.guard import ngrams

    codes, classes, _ = ngrams.characters([one])
    plain, kinds = "".join(map(chr, codes.tolist())), classes.tolist()
    return {
        plain[place : place + size]
        for place, kind in enumerate(kinds)
        if kind and place + (size := ngrams.LETTERS if kind == 1 else ngrams.CHARACTERS) <= len(plain)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=4_000)
    parser.add_argument("--against", type=int, default=20_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(scale(args.folder, args.part)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Path(folder)
        write(place, args.rows)
        result: dict[str, Any] = {"machine": machine("numpy", "datasketch", "phonenumbers"), "scale": {}}
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--folder", str(place)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result["scale"][part] = json.loads(done.stdout)
            print(part, json.dumps(result["scale"][part]), flush=True)
        result["accuracy"] = accuracy(place, args.sample) | {"threshold": THRESHOLD, "permutations": PERMUTATIONS}
        print(json.dumps(result["accuracy"]), flush=True)
        result["datasketch"] = against_datasketch(place, args.against)
        print(json.dumps(result["datasketch"]), flush=True)
    write_result("guard_scale", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
