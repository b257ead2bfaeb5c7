"""Attention of one layer over a flat sequence on the CPU, forward and backward: ours beside PyTorch's fused kernel.

    python benchmarks/attention.py [--repeats 7]

512 tokens as rows of 64 to 512, heads and type of SmolLM2-135M. The two take turns; the fastest time of each is
reported, because whatever else runs on the machine can only add to it. Writes benchmarks/results/attention-<date>.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, write_result

from llmkit.training.attention import _by_rows, _RowAttention

HEADS, KV_HEADS, DIM, TOKENS = 9, 3, 64, 512


def seconds(attention: Callable[..., Any], lengths: tuple[int, ...]) -> tuple[float, float]:
    """Forward and backward pass of one layer."""
    shapes = ((HEADS, TOKENS, DIM), (KV_HEADS, TOKENS, DIM), (KV_HEADS, TOKENS, DIM))
    q, k, v = (torch.randn(s, dtype=torch.bfloat16).requires_grad_() for s in shapes)
    start = time.perf_counter()
    out = attention(q, k, v, lengths, DIM**-0.5, 0)
    middle = time.perf_counter()
    out.backward(torch.ones_like(out))
    return middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    kinds = {"llmkit": _RowAttention.apply, "pytorch": _by_rows}
    rows = []
    for length in (64, 128, 256, 512):
        lengths = (length,) * (TOKENS // length)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for turn in range(repeats + 1):
            for name, attention in kinds.items():
                found = seconds(attention, lengths)
                if turn:  # the first warms up
                    times[name].append(found)
        row: dict[str, Any] = {"rows": len(lengths), "length": length}
        for name, found in times.items():
            row[f"{name}_forward_ms"] = round(min(f for f, _ in found) * 1e3, 3)
            row[f"{name}_backward_ms"] = round(min(b for _, b in found) * 1e3, 3)
        row["backward_ratio"] = round(row["pytorch_backward_ms"] / row["llmkit_backward_ms"], 2)
        rows.append(row)
        print(row)
    threads = torch.get_num_threads()
    result = {
        "benchmark": "attention",
        "machine": machine("torch"),
        "threads": threads,
        "type": "bfloat16",
        "rows": rows,
    }
    write_result("attention", result)


if __name__ == "__main__":
    main()
