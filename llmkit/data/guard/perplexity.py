"""How unlikely a small model finds each row: exp of the mean loss a token, and the histogram that shows the cut.

Source: perplexity filtering as in CCNet (Wenzek et al., 2020), with a neural model in the n-gram model's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.context import Progress
from llmkit.data.guard.settings import PerplexitySettings
from llmkit.errors import UsageError
from llmkit.modeling.locate import check_folder, find_folder

HISTOGRAM = "perplexity.png"
_AT_ONCE = 512
_BATCH_TOKENS = 2_048


def score(texts: Iterable[str], count: int, settings: PerplexitySettings, progress: Progress) -> NDArray[np.float32]:
    """Perplexity of each text by its first ``max_length`` tokens; NaN for texts of fewer than two tokens.

    Raises MissingError when the model is not there, UsageError when it is no causal model.
    """
    model, tokenizer = _load(settings)
    found: list[float] = []
    with progress.task(f"scoring with {settings.model}", count, "rows") as task:
        for some in _groups(texts):
            found += _scores(some, model, tokenizer, settings.max_length)
            task.advance(len(some))
    return np.array(found, np.float32)


def _load(settings: PerplexitySettings) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_folder(settings.model, settings.revision)
    check_folder(folder)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        raise UsageError(
            f"data.guard.quality.perplexity.model: {settings.model}: {str(error).splitlines()[0]}"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    left = iter(texts)
    while some := list(islice(left, _AT_ONCE)):
        yield some


def _scores(texts: list[str], model: Any, tokenizer: Any, limit: int) -> list[float]:
    """Rows of like length go through the model together, so that little is padding."""
    import torch

    rows = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in texts]
    found = [float("nan")] * len(rows)
    order = sorted((n for n, ids in enumerate(rows) if len(ids) > 1), key=lambda n: len(rows[n]))
    while order:
        longest = len(rows[order[-1]])
        take = max(1, _BATCH_TOKENS // longest)
        batch, order = order[-take:], order[:-take]
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        known = torch.zeros((len(batch), longest))
        for place, n in enumerate(batch):
            ids[place, : len(rows[n])] = torch.tensor(rows[n])
            known[place, : len(rows[n])] = 1
        ids, known = ids.to(model.device), known.to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=known).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        means = (losses * known[:, 1:]).sum(1) / known[:, 1:].sum(1)
        for n, mean in zip(batch, means.tolist(), strict=True):
            found[n] = float(np.exp(min(mean, 80.0)))
    return found


def cut(scores: NDArray[np.float32], settings: PerplexitySettings) -> float:
    """The perplexity above which rows are named."""
    if settings.max is not None:
        return settings.max
    known = scores[~np.isnan(scores)]
    assert settings.drop_above_percentile is not None, "the settings ask for one of both"
    return float(np.percentile(known, settings.drop_above_percentile)) if len(known) else float("inf")


def histogram(path: Path, scores: NDArray[np.float32], at: float, model: str) -> None:
    """Draw the perplexities on a logarithmic axis with the cut marked, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = scores[~np.isnan(scores)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(known):
        low, high = float(known.min()), float(known.max())
        bins = np.geomspace(low, max(high, low * 1.01), 60)
        axes.stairs(np.histogram(known, bins)[0], bins, fill=True, label=f"{len(known):,} rows")
    if np.isfinite(at):
        above = int(np.sum(known > at))
        axes.axvline(at, color="black", linestyle="--", label=f"cut at {at:,.1f}: {above:,} rows above")
    axes.set(xscale="log", xlabel=f"perplexity under {Path(model).name}", ylabel="rows", title="Perplexity of the rows")
    axes.legend()
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)
