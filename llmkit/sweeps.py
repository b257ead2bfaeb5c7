"""``--sweep KEY=[V1,V2]``: one run for each value; with several, for each combination, in folders beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from llmkit.errors import UsageError
from llmkit.recipe import Recipe
from llmkit.runner import quoted

MOST = 1000


def points(sweep: Sequence[str], recipe: Recipe) -> Iterator[list[str]]:
    """The overrides of each run, its folder (``<output_dir>/0``, ``1``, …) among them, in the order of the values.

    Raises UsageError for a sweep that is not ``KEY=[V1,V2]``.
    """
    axes = [_axis(text) for text in sweep]
    count = 1
    for _, values in axes:
        count *= len(values)
    if count > MOST:
        raise UsageError(f"--sweep: {count} runs are more than the {MOST} that one array holds.")
    for i, combination in enumerate(product(*(values for _, values in axes))):
        changes = [f"{key}={value}" for (key, _), value in zip(axes, combination, strict=True)]
        folder = f"{recipe.output_dir.rstrip('/')}/{i}"
        yield [*changes, f"name={quoted(f'{recipe.name}-{i}')}", f"output_dir={quoted(folder)}"]


def _axis(text: str) -> tuple[str, list[str]]:
    import json

    from llmkit.yaml_positions import read

    key, equals, raw = text.partition("=")
    values = read(raw, "--sweep").data if equals else None
    if not isinstance(values, list) or not values:
        raise UsageError(f"--sweep {text}: write KEY=[V1,V2], e.g. train.learning_rate=[1e-5,2e-5].")
    return key.strip(), [json.dumps(value, ensure_ascii=False) for value in values]
