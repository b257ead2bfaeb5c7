"""Damaged data files through ``prepare``: only a DataError, or a success whose report adds up, may come out.

    python benchmarks/fuzz_data.py [--cases 500] [--command-line 30] [--seed 0]

Each case writes good rows in one of the formats and kinds of file, damages them, and prepares them with random settings.
Cases run in processes of their own, so that a crash of a native library counts as a failure too. Some of the cases that
end in a DataError are then given to the real ``llmkit sft``: exit code 3, no traceback. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Quiet, machine, write_result

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

KINDS = (
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".parquet",
    ".arrow",
    ".feather",
    ".jsonl.gz",
    ".csv.gz",
    ".json.gz",
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["user assistant what is the answer"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


# --- rows and files -------------------------------------------------------------------------------------------------


def good_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Rows of one of the formats."""
    shape = rng.choice(["messages", "sharegpt", "alpaca", "prompt_completion", "text"])
    words = ["what", "is", "the", "answer", "한국어", "中文", "<|im_end|>", '"', ",", "\n", "\t", "é", "😀", "0"]

    def text() -> str:
        return "a" + " ".join(rng.choices(words, k=rng.randint(1, 12)))

    made: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 40)):
        if shape == "messages":
            made.append({"messages": [{"role": role, "content": text()} for role in ("user", "assistant")]})
        elif shape == "sharegpt":
            made.append({"conversations": [{"from": who, "value": text()} for who in ("human", "gpt")]})
        elif shape == "alpaca":
            made.append({"instruction": text(), "input": rng.choice(["", text()]), "output": text()})
        elif shape == "prompt_completion":
            made.append({"prompt": text(), "completion": text()})
        else:
            made.append({"text": text()})
    return made


def spoil_values(rows: list[dict[str, Any]], rng: random.Random) -> None:
    """Wrong types, missing columns, NUL, half surrogates, NaN, deep nesting, huge and empty texts, in some rows."""
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    values = [
        None,
        3,
        float("nan"),
        float("inf"),
        True,
        [],
        {},
        "",
        " ",
        "a\0b",
        "\ud800",
        deep,
        ["x"],
        "y " * 5_000,
        [[]],
    ]
    for _ in range(rng.randint(1, 4)):
        row = rng.choice(rows)
        if not row:
            continue
        key = rng.choice(list(row))
        what = rng.random()
        if what < 0.2:
            del row[key]
        elif what < 0.6 or not isinstance(row[key], list) or not row[key]:
            row[key] = rng.choice(values)
        elif isinstance(row[key][0], dict):
            turn = rng.choice(row[key])
            if isinstance(turn, dict) and turn:
                turn[rng.choice(list(turn))] = rng.choice(values)
            if rng.random() < 0.3:
                row[key] = row[key][: rng.randint(0, 1)]


def write(path: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    """Rows as a file of a kind; what the kind cannot hold (mixed types in Parquet) is written as text in it."""
    import csv
    import io

    plain = kind.removesuffix(".gz")
    if plain in (".parquet", ".arrow", ".feather"):
        path.write_bytes(columnar(plain, rows))
        return
    if plain == ".jsonl":
        raw = "".join(json.dumps(row) + "\n" for row in rows)
    elif plain == ".json":
        raw = json.dumps(rows if len(rows) % 2 else {"data": rows})
    elif plain == ".txt":
        raw = "\n".join(str(value) for row in rows for value in row.values())
    else:
        stream = io.StringIO()
        names = sorted({name for row in rows for name in row}) or ["text"]
        writer = csv.DictWriter(stream, names, delimiter="\t" if plain == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        raw = stream.getvalue()
    data = raw.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)


def columnar(kind: str, rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, UnicodeEncodeError, TypeError, ValueError):
        table = pa.Table.from_pylist([{"text": json.dumps(row)} for row in rows])
    if not table.num_columns:
        table = pa.table({"text": pa.array([None] * len(rows))})
    sink = pa.BufferOutputStream()
    if kind == ".parquet":
        pq.write_table(table, sink)
    else:
        opened = pa.ipc.new_stream if kind == ".arrow" else pa.ipc.new_file
        with opened(sink, table.schema) as writer:
            writer.write_table(table)
    return bytes(sink.getvalue())


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randint(0, len(data))]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 20)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def insert(data: bytes, rng: random.Random) -> bytes:
    what = rng.choice(
        [b"\0" * 5, b"\xff\xfe", b"\xed\xa0\x80", b"\r", b'"', b"\n\n", b"\xef\xbb\xbf", b"[" * 5_000, b"9" * 6_000]
    )
    at = rng.randint(0, len(data))
    return data[:at] + what + data[at:]


def recode(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp949", "utf-8-sig"]), "replace")


def huge(data: bytes, _: random.Random) -> bytes:
    return data + b'{"text": "' + b"long " * 400_000 + b'"}\n'


def nest(data: bytes, _: random.Random) -> bytes:
    return data + (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")


def shuffle_bytes(_: bytes, rng: random.Random) -> bytes:
    return bytes(rng.getrandbits(8) for _ in range(rng.randint(0, 3_000)))


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "nothing": lambda data, _: data,
    "cut": cut,
    "bit flips": flip,
    "inserted bytes": insert,
    "other encoding": recode,
    "huge line": huge,
    "deep nesting": nest,
    "random bytes": shuffle_bytes,
    "empty": lambda *_: b"",
}


def make_case(folder: Path, number: int, seed: int) -> tuple[Path, dict[str, Any], str]:
    """Write the file of a case: its path, the data settings, and what was done to it."""
    rng = random.Random(seed * 1_000_003 + number)
    kind = KINDS[number % len(KINDS)]
    rows = good_rows(rng)
    spoiled = rng.random() < 0.5
    if spoiled:
        spoil_values(rows, rng)
    path = folder / f"case{number}{kind}"
    write(path, kind, rows)
    damage = "nothing" if spoiled and rng.random() < 0.5 else rng.choice(list(DAMAGES))
    path.write_bytes(DAMAGES[damage](path.read_bytes(), rng))
    settings = {
        "train": str(path),
        "format": rng.choice(["auto"] * 15 + ["messages", "sharegpt", "alpaca", "prompt_completion", "text"]),
        "max_length": rng.choice([64, 256, 1024]),
        "on_too_long": rng.choice(["error", "drop", "drop", "truncate", "truncate"]),
        "on_bad_row": rng.choice(["error", "drop", "drop", "drop"]),
        "packing": rng.random() < 0.5,
    }
    if rng.random() < 0.3:
        settings["eval"] = {"split": 0.2}
    return path, settings, f"{kind}, {'wrong values, ' if spoiled else ''}{damage}"


# --- checks ---------------------------------------------------------------------------------------------------------


def check(settings: dict[str, Any], folder: Path, made: PreTrainedTokenizerFast) -> str:
    """Prepare: ``done`` or ``data error``; AssertionError when the report does not add up; else what was raised."""
    from llmkit.data.prepare import prepare
    from llmkit.data.render import Renderer
    from llmkit.data.settings import DataSettings
    from llmkit.errors import DataError

    data = DataSettings(**settings, cache_dir=str(folder / "cache"))
    try:
        done = prepare(data, Renderer(made), seed=0, output_dir=folder / "out", progress=Quiet())
    except DataError as error:
        message = str(error)
        assert message and len(message) < 10_000, f"a message of {len(message)} characters"
        return "data error"
    (source,) = done.report["sources"]
    lost = source["rows_bad"] + (source["rows_too_long"] if data.on_too_long == "drop" else 0)
    assert source["rows_read"] == source["rows_used"] + lost, source
    assert lost == sum(entry["count"] for entry in source["bad"]) + (
        len(source["too_long"]) if data.on_too_long == "drop" else 0
    )
    stored = len(done.train) + (len(done.eval) if done.eval else 0)
    assert stored == source["rows_used"] or (stored > source["rows_used"] and source["documents_split"]), stored
    assert int(done.train.lengths.max()) <= data.max_length
    assert done.train.supervised > 0
    return "done"


def work(first: int, last: int, seed: int) -> None:
    """A range of cases; a line of JSON each."""
    made = tokenizer()
    for number in range(first, last):
        with tempfile.TemporaryDirectory() as name:
            _, settings, what = make_case(Path(name), number, seed)
            print(json.dumps({"case": number, "what": what, "outcome": "crash"}), flush=True)
            try:
                outcome = check(settings, Path(name), made)
            except Exception as error:  # noqa: BLE001  that is what is looked for
                outcome = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps({"case": number, "what": what, "outcome": outcome}), flush=True)


def fuzz(cases: int, seed: int, batch: int = 50) -> dict[int, dict[str, Any]]:
    """All cases, ``batch`` to a process; a case whose process died has the outcome ``crash``."""
    found: dict[int, dict[str, Any]] = {}
    first = 0
    while first < cases:
        last = min(first + batch, cases)
        argv = [sys.executable, __file__, "--work", f"{first}:{last}", "--seed", str(seed)]
        done = subprocess.run(argv, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            entry = json.loads(line)
            found[entry["case"]] = entry
        if done.returncode:
            crashed = max((case for case in found if first <= case < last), default=first)
            found.setdefault(crashed, {"case": crashed, "what": "?", "outcome": "crash"})
            found[crashed]["stderr"] = done.stderr[-500:]
            first = crashed + 1
        else:
            first = last
        print(f"{first} of {cases} cases", flush=True)
    return found


def command_line(numbers: list[int], seed: int) -> list[dict[str, Any]]:
    """Cases that end in a DataError, through the real ``llmkit sft``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = tokenizer()
        made.save_pretrained(folder / "model")
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        LlamaForCausalLM(LlamaConfig(vocab_size=len(made), **sizes)).save_pretrained(folder / "model")
        for number in numbers:
            _, settings, what = make_case(folder, number, seed)
            recipe = {
                "name": f"fuzz-{number}",
                "output_dir": str(folder / f"run{number}"),
                "model": {"name_or_path": str(folder / "model")},
                "data": settings | {"cache_dir": str(folder / "cache")},
                "train": {"max_steps": 1},
                "tracking": {"enabled": False},
            }
            (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
            argv = [sys.executable, "-m", "llmkit", "sft", str(folder / "recipe.yaml")]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=300, cwd=folder)
            right = done.returncode == 3 and "Traceback" not in done.stderr + done.stdout
            results.append({"case": number, "what": what, "exit_code": done.returncode, "right": right})
            if not right:
                results[-1]["stderr"] = done.stderr[-800:]
            print(f"command line, case {number}: exit code {done.returncode}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--command-line", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        first, last = map(int, args.work.split(":"))
        work(first, last, args.seed)
        return
    begin = time.perf_counter()
    found = fuzz(args.cases, args.seed)
    wrong = [entry for entry in found.values() if entry["outcome"] not in ("done", "data error")]
    refused = [case for case, entry in found.items() if entry["outcome"] == "data error"]
    picked = refused[:: max(1, len(refused) // max(1, args.command_line))][: args.command_line]
    commands = command_line(picked, args.seed)
    result = {
        "machine": machine("pyarrow", "tokenizers"),
        "seed": args.seed,
        "cases": len(found),
        "outcomes": Counter(entry["outcome"] if entry not in wrong else "wrong" for entry in found.values()),
        "damages": Counter(entry["what"].split(", ", 1)[1] for entry in found.values()),
        "kinds": Counter(entry["what"].split(",")[0] for entry in found.values()),
        "wrong": wrong,
        "command_line": {"cases": len(commands), "wrong": [entry for entry in commands if not entry["right"]]},
        "seconds": time.perf_counter() - begin,
    }
    print(
        json.dumps(
            {key: result[key] for key in ("cases", "outcomes", "wrong", "command_line")}, indent=2, ensure_ascii=False
        )
    )
    write_result("fuzz_data", result)
    failed = bool(wrong) or any(not entry["right"] for entry in commands)
    raise SystemExit(1 if failed or len(found) != args.cases else 0)


if __name__ == "__main__":
    main()
