"""llmkit from Python: one function a stage, the same runner, tracking and errors as the command line.

::

    import llmkit

    result = llmkit.sft("recipe.yaml", {"train.max_steps": 20})
    print(result.metrics)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from llmkit import runner, stages, uris
from llmkit.context import Result
from llmkit.launch import local
from llmkit.launch.job import Job
from llmkit.recipe import Recipe, load_recipe, parse

RecipeLike = str | Path | Recipe | Mapping[str, Any]
Overrides = Mapping[str, Any] | Sequence[str]


class Stage(Protocol):
    """What ``llmkit.sft`` and its like are."""

    def __call__(
        self, recipe: RecipeLike, overrides: Overrides | None = None, *, output_dir: str | Path | None = None,
        resume: str = "auto",
    ) -> Result: ...  # fmt: skip


def run(
    stage: str,
    recipe: RecipeLike,
    overrides: Overrides | None = None,
    *,
    output_dir: str | Path | None = None,
    resume: str = "auto",
) -> Result:
    """Run ``stage`` and give back its result: in this process, or in as many as ``launch.processes`` says.

    ``recipe`` is the path of a YAML file, a mapping like one, or the stage's ``Recipe``; ``overrides`` are
    ``{"train.max_steps": 20}`` or ``["train.max_steps=20"]``. Raises the classes of ``llmkit.errors``.
    """
    resolved = resolve(stage, recipe, overrides, output_dir=output_dir)
    named = [str(change).split("=")[0] for change in overrides or ()]
    if output_dir is None and "output_dir" not in named and not isinstance(recipe, Recipe):
        resolved = resolved.in_own_folder()
    folder = runner.folder_of(resolved)
    argv = ("llmkit", "run", uris.recipe_of(resolved.output_dir, folder))
    job = Job(argv, output_dir=folder, cwd=Path.cwd(), resources=local.resources(resolved))
    return local.submit(job, resolved, stage, resume)


def resolve(
    stage: str, recipe: RecipeLike, overrides: Overrides | None = None, *, output_dir: str | Path | None = None
) -> Recipe:
    """The typed recipe that ``run`` would run. ``RecipeError`` with every mistake."""
    kind: type[Recipe] = stages.load(stage).Recipe
    given: dict[str, Any] | list[str] = (
        dict(overrides) if isinstance(overrides, Mapping) else list(overrides) if overrides is not None else {}
    )
    if output_dir is not None:
        given = _with_output_dir(given, str(output_dir))
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, kind, given)
    if isinstance(recipe, Recipe):
        if not isinstance(recipe, kind):
            raise TypeError(f"llmkit.{stage} wants a {kind.__module__}.Recipe, not a {type(recipe).__module__}.Recipe")
        if not given:
            return recipe
        recipe = recipe.model_dump(exclude_unset=True)
    return parse(recipe, kind, given)


def _with_output_dir(overrides: dict[str, Any] | list[str], output_dir: str) -> dict[str, Any] | list[str]:
    if isinstance(overrides, dict):
        return overrides | {"output_dir": output_dir}
    return [*overrides, f"output_dir={runner.quoted(output_dir)}"]


@cache
def stage(name: str) -> Stage:
    """The function of one stage, with its name and its recipe's docstring, so that ``help(llmkit.sft)`` helps."""

    def call(
        recipe: RecipeLike, overrides: Overrides | None = None, *, output_dir: str | Path | None = None,
        resume: str = "auto",
    ) -> Result:  # fmt: skip
        return run(name, recipe, overrides, output_dir=output_dir, resume=resume)

    module = stages.load(name)
    call.__name__ = call.__qualname__ = name.replace("-", "_")
    call.__module__ = "llmkit"
    call.__doc__ = f"{module.Recipe.__doc__}\n\n{run.__doc__}"
    return call


sft: Stage
lora: Stage
cpt: Stage
prompt_test: Stage
check_data: Stage
embed: Stage
label: Stage


def __getattr__(name: str) -> Stage:
    if (found := stages.by_attribute(name)) is not None:
        return stage(found)
    raise AttributeError(f"module 'llmkit.api' has no attribute {name!r}")
