"""What the front matter of a prompt template says: its variables, and how its demonstrations are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmkit.recipe import Conflict, Settings

VariableType = Literal["string", "integer", "number", "boolean", "array", "object"]
_PYTHON: dict[VariableType, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
}
GIVEN = ("examples", "output_schema", "language")
"""Names that every template can use without declaring them."""


class Variable(Settings):
    free_text: ClassVar[frozenset[str]] = frozenset({"default", "description", "choices"})

    name: Annotated[str, Field(min_length=1)]
    """Name of a column of the cases, and of the variable in the template."""
    type: VariableType = "string"
    """Type of the value, in JSON's words."""
    required: bool = True
    """False lets a case leave it out; the template then gets ``default``."""
    default: Any = None
    """Value where a case has none (or null); only with ``required: false``."""
    choices: list[Any] | None = None
    """Every value that is allowed; None allows all of the type."""
    description: str = ""
    """What it is, for people."""

    def conflicts(self) -> Iterator[Conflict]:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.name):
            yield Conflict("name", f"{self.name!r} is no name that Jinja can use", "letters, digits and _ only")
        elif self.name in GIVEN:
            yield Conflict("name", f"`{self.name}` is given to every template already", "take another name")
        if self.required and self.default is not None:
            yield Conflict("default", "is never used", "write `required: false` too", ("required",))
        elif not self.required and self.default is not None and (why := self.wrong(self.default)):
            yield Conflict("default", why, also=("type", "choices"))
        if self.choices is not None:
            if not self.choices:
                yield Conflict("choices", "is empty, so that no value is allowed", "remove the line to allow all")
            for value in self.choices:
                if not self._is_of_type(value):
                    yield Conflict("choices", f"{value!r} is not of the type {self.type}", also=("type",))

    def _is_of_type(self, value: Any) -> bool:
        if isinstance(value, bool) and self.type != "boolean":
            return False
        return isinstance(value, _PYTHON[self.type])

    def wrong(self, value: Any) -> str:
        """Why ``value`` is none of this variable's, in words; empty when it is one."""
        if not self._is_of_type(value):
            return f"`{self.name}` must be of the type {self.type}, got {str(value)[:40]!r} ({type(value).__name__})"
        if self.choices is not None and value not in self.choices:
            allowed = ", ".join(map(str, self.choices[:12])) + (", …" if len(self.choices) > 12 else "")
            return f"`{self.name}` must be one of {allowed}; got {str(value)[:40]!r}"
        return ""


class FewShot(Settings):
    """Which demonstrations a prompt shows. A case is never shown itself, nor a demonstration with the same ``key``."""

    free_text: ClassVar[frozenset[str]] = frozenset({"examples"})

    choose: Literal["fixed", "random", "nearest", "same"] = "fixed"
    """``fixed``: the first ones; ``random``: by ``seed``; ``nearest``: most alike in ``key``, the most alike last;
    ``same``: the nearest among those with the same ``category``."""
    count: Annotated[int, Field(ge=1, le=1000)] = 3
    """How many are shown, at most."""
    examples: str | list[dict[str, Any]]
    """The demonstrations: a list of mappings, or a file of them (.jsonl, .json, .csv, …), relative to the template."""
    seed: int = 0
    """Seed of ``random``. The choice for a case depends on the seed and the case only, not on the order of cases."""
    key: str | None = None
    """Field by which a case and a demonstration are compared; None compares all variables that both have."""
    category: str | None = None
    """Field that has to be equal for ``same``."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.choose == "same" and not self.category:
            yield Conflict("category", "is missing: `choose: same` takes demonstrations of the same category")
        if self.choose != "same" and self.category:
            yield Conflict("category", f"is not used with `choose: {self.choose}`", "write `choose: same`", ("choose",))
        if self.examples == []:
            yield Conflict("examples", "is empty", "remove the whole block `few_shot` to show none")
        if isinstance(self.examples, list):
            for field in filter(None, (self.key, self.category)):
                without = [i for i, example in enumerate(self.examples) if field not in example]
                if without:
                    yield Conflict(f"examples.{without[0]}", f"has no {field!r}", also=("key", "category"))


class TemplateSettings(Settings):
    """The front matter of a template file."""

    free_text: ClassVar[frozenset[str]] = frozenset({"description", "output_schema", "answer"})

    name: Annotated[str, Field(min_length=1)]
    """Name in tables and reports."""
    version: str | int = 1
    """Version: two versions of one name are compared."""
    language: str = ""
    """Language of the prompt and the answer, e.g. ``ko``, ``zh``, ``en``."""
    description: str = ""
    """What it does and for whom."""
    kind: Literal["chat", "text"] = "chat"
    """``chat`` makes messages for the model's chat template; ``text`` a plain text that the model continues."""
    variables: list[Variable] = Field(default_factory=list)
    """What a case has to bring."""
    few_shot: FewShot | None = None
    """Demonstrations, which the template reads as ``examples``; None shows none."""
    answer: str | None = None
    """Jinja text of the right answer of a case, e.g. ``"{{ label }}"``: what training teaches and tests expect."""
    output_schema: dict[str, Any] | None = None
    """JSON schema that the answer has to follow."""

    def conflicts(self) -> Iterator[Conflict]:
        names = [variable.name for variable in self.variables]
        for i, name in enumerate(names):
            if name in names[:i]:
                yield Conflict(f"variables.{i}.name", f"`{name}` is declared twice")
        if self.output_schema is not None and (why := _schema_mistake(self.output_schema)):
            yield Conflict("output_schema", why)


def _schema_mistake(schema: Mapping[str, Any]) -> str:
    """Why a mapping is no JSON schema."""
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema).check_schema(dict(schema))
    except jsonschema.SchemaError as error:
        where = "".join(f".{part}" for part in error.absolute_path)
        return f"is no JSON schema: {where.lstrip('.')}{': ' if where else ''}{error.message}"
    return ""
