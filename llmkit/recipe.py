"""Recipes: the typed, frozen settings of a stage, and the YAML file that is their written form.

A recipe is read as YAML 1.2 (``1e-5`` is a number, ``no`` is text). Every mistake is reported at once, with file,
line, column and what was probably meant. Nothing is expanded: ``${VAR}`` and ``~`` in a value are mistakes, because
the frozen recipe of a run must mean the same on every machine and for every user; ``KEY=VALUE`` on the command line,
where the shell expands them, is the place for what differs. Secrets are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from llmkit import overrides as override_keys
from llmkit.errors import Problem, RecipeError
from llmkit.launch_settings import LaunchSettings
from llmkit.overrides import Overrides
from llmkit.profiles import put_under
from llmkit.recipe_errors import Conflict, find_problems, remaining, tidy
from llmkit.secrets import mask, names_secret
from llmkit.settings import Settings
from llmkit.uris import is_uri, mistake
from llmkit.yaml_positions import MAX_DEPTH, Document, Place, add_core_schema, read_file

__all__ = [
    "Conflict", "LaunchSettings", "Overrides", "Recipe", "Settings", "TrackingSettings", "diff", "dump", "load_recipe", "parse",
]  # fmt: skip


with warnings.catch_warnings():
    # pydantic warns that the field `register` hides ABCMeta.register, which nobody calls on settings.
    warnings.filterwarnings("ignore", message='Field name "register"')

    class TrackingSettings(Settings):
        enabled: bool = True
        """False keeps the metrics in the output folder only."""
        uri: str | None = None
        """MLflow tracking URI; None takes MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db`` in the working directory."""
        experiment: str | None = None
        """MLflow experiment; None takes MLFLOW_EXPERIMENT_NAME, else ``llmkit``."""
        run_name: str | None = None
        """Name of the run; None takes the recipe's ``name``."""
        tags: dict[str, str] = Field(default_factory=dict)
        """Tags of the run."""
        log_model: bool = False
        """Store the finished model in MLflow with a signature."""
        register: str | None = None
        """Register the stored model under this name; implies ``log_model``."""
        alias: str | None = None
        """Alias given to the registered version, e.g. ``candidate``; needs ``register``."""
        system_metrics: bool = True
        """Sample CPU, memory, disk and GPU while the run lasts."""

        @model_validator(mode="before")
        @classmethod
        def _registering_logs(cls, data: Any) -> Any:
            if isinstance(data, dict) and data.get("register") is not None:
                return {"log_model": True} | data
            return data

        def conflicts(self) -> Iterator[Conflict]:
            if self.register and not self.log_model and "log_model" in self.model_fields_set:
                hint = "remove `log_model: false`"
                yield Conflict("log_model", "a model that is registered is stored too", hint, ("register",))
            if self.alias and not self.register:
                yield Conflict("alias", "needs `register`, the name of the registered model", also=("register",))


class Recipe(Settings):
    """What every stage has."""

    starts_over: ClassVar[bool] = False
    """Whether a run of a changed recipe, or of changed inputs, in a folder that is taken moves the old run aside (as
    ``--resume never`` does) instead of being refused: for stages that are run again and again, and compared."""

    folder_suffix: ClassVar[str] = ""
    """Put behind ``output_dir`` where the command line gives none: for stages that take the recipe of another stage."""

    name: str
    """Name of the run, in the tracker and in messages; it names the run's folder too."""
    seed: int = 0
    """Seed of everything random: order, dropout, initial weights, samples."""
    output_dir: str = Field(default_factory=lambda data: f"runs/{data.get('name', 'run')}")
    """Folder of the run, ``runs/<name>`` by default, or a URI such as ``s3://bucket/runs/mine`` (docs/object-store.md). A run of the same recipe in it is resumed, of another refused."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""
    several_processes: ClassVar[bool] = False
    """Whether a run of this stage can be divided among processes."""
    launch: LaunchSettings = LaunchSettings()
    """How the run is started; it may differ between two starts of a run."""

    def conflicts(self) -> Iterator[Conflict]:
        if wrong := _wrong_name(self.name):
            yield Conflict("name", f"{wrong}; it names a folder")
        if not self.output_dir.strip():
            yield Conflict("output_dir", "is empty", "remove the line to take `runs/<name>`")
        if is_uri(self.output_dir) and (why := mistake(self.output_dir)):
            yield Conflict("output_dir", why, "e.g. s3://bucket/runs/mine")
        if not 0 <= self.seed < 2**32:
            yield Conflict("seed", "expected a whole number from 0 to 4294967295")
        for key, several in (("processes", self.launch.processes not in ("auto", 1)), ("nodes", self.launch.nodes > 1)):
            if several and not self.several_processes:
                yield Conflict(f"launch.{key}", "this stage runs as one process", "remove it, or set it to 1")

    def input_digests(self) -> Mapping[str, str]:
        """Digests of what a run reads beside ``data``, by name: by them a run knows that its inputs changed."""
        return {}

    def in_own_folder(self) -> Self:
        """The same recipe in a folder of this stage's own, where the recipe was written for another stage."""
        if not self.folder_suffix:
            return self
        return self.model_copy(update={"output_dir": self.output_dir.rstrip("/") + self.folder_suffix})


def _wrong_name(name: str) -> str:
    if not name.strip():
        return "is empty"
    if name != name.strip() or name[0] in ".-":
        return "begins with a dot or a dash, or has spaces around it"
    wrong = next((c for c in name if c in '/\\<>:"|?*' or ord(c) < 32), None)
    if wrong:
        return f"must not hold {wrong!r}"
    return "is longer than 120 bytes" if len(name.encode(errors="replace")) > 120 else ""


R = TypeVar("R", bound=Recipe)


def load_recipe(path: str | Path, recipe_type: type[R], overrides: Overrides = (), *, profile: str | None = None) -> R:
    """Read, override and validate a recipe file. Raises RecipeError with every mistake that was found.

    ``profile`` names a file of launch settings (see ``llmkit.profiles``), over which the recipe's own win.
    """
    document = read_file(path)
    put_under(document, profile)
    return _build(document, recipe_type, overrides)


def parse(data: Mapping[str, Any], recipe_type: type[R], overrides: Overrides = (), *, profile: str | None = None) -> R:
    """The same for a mapping, from Python; ``overrides`` may be ``{"train.max_steps": 20}``. Raises RecipeError."""
    document = Document(_plain(data), Place("recipe"))
    put_under(document, profile)
    return _build(document, recipe_type, overrides)


def _build(document: Document, recipe_type: type[R], overrides: Overrides) -> R:
    where, source = str(document.root), document.root.source
    if document.data is None:
        raise RecipeError([Problem(where, "", "the recipe is empty", "`llmkit init STAGE` writes one to start from")])
    if not isinstance(document.data, dict):
        found = "a list" if isinstance(document.data, list) else "a single value"
        hint = "is it a data file?" if found == "a list" else ""
        raise RecipeError([Problem(where, "", f"a recipe is a mapping of keys to values, this is {found}", hint)])
    if isinstance(overrides, Mapping):
        overrides = {str(key): _plain(value) for key, value in overrides.items()}
    refused = override_keys.apply(document, overrides)
    problems = list(document.problems)
    try:
        recipe = recipe_type.model_validate(document.data)
    except ValidationError as error:
        problems += find_problems(recipe_type, document) or remaining(error, document)
    if problems := problems + refused:
        raise RecipeError(tidy(problems, source))
    return recipe


def _plain(value: Any, depth: int = 0) -> Any:
    """Values from Python as YAML would give them: paths are text, tuples lists, settings mappings."""
    if depth > MAX_DEPTH:
        raise RecipeError([Problem("recipe", "", f"blocks are nested more than {MAX_DEPTH} deep")])
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Writes what the loader reads back, whatever text looks like; the same object twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML's other styles write NEL and the Unicode line separators as they are, and read them back as line feeds.
    style = '"' if any(c in "\n\r\x85\u2028\u2029" for c in text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


add_core_schema(_Dumper)
_Dumper.add_representer(str, _text)


def dump(recipe: Recipe) -> str:
    """The resolved recipe, every setting written out, as YAML that ``load_recipe`` reads back to an equal recipe.

    A recipe that was validated holds no secret; what was put into one behind its back is masked.
    """
    masked = _masked(recipe.model_dump())
    return yaml.dump(masked, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        hidden = {k for k, v in value.items() if v and isinstance(v, str) and names_secret(k)}
        return {mask(k): "***" if k in hidden else _masked(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return mask(value) if isinstance(value, str) else value


def diff(a: Recipe, b: Recipe) -> list[str]:
    """Dotted keys whose values differ, in the order of the recipe."""
    first, second = dict(_flat(a.model_dump())), dict(_flat(b.model_dump()))
    missing = object()
    return [key for key in first | second if first.get(key, missing) != second.get(key, missing)]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
