"""The voters of a labelling job: every model with every template, and what rows become for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Conversation, Message, PromptCompletion
from llmkit.errors import DataError
from llmkit.inference.engines import system_of
from llmkit.inference.settings import AnsweringModel, LocalModelSettings
from llmkit.labelling.labels import LabelSet
from llmkit.modeling.locate import find_folder, weights_folder
from llmkit.modeling.tokenizer import configured_stops, open_tokenizer
from llmkit.prompting.few_shot import Demonstrations
from llmkit.prompting.template import PromptTemplate, load_template

if TYPE_CHECKING:
    from llmkit.stages.label import Recipe

Ids = NDArray[np.int32]
Prompt = list[Message] | str


@dataclass(frozen=True)
class Voter:
    """``name`` is ``model``, or ``model/template`` where there are several templates."""

    name: str
    model: AnsweringModel
    template: int


@dataclass(frozen=True)
class Asked:
    """One row: its prompt in every template, and the tokens of it for every voter whose model is in this process."""

    prompts: Sequence[Prompt]
    ids: Sequence[Ids | None]


class Prompts:
    """Makes prompts of rows, by the recipe's templates and the renderers that the models' training used."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.templates: list[PromptTemplate] = [load_template(path) for path in recipe.all_templates]
        self.labels = None if recipe.labels is None else LabelSet.read(recipe.labels)
        self._chosen: list[Demonstrations | None] = [template.demonstrations() for template in self.templates]
        self._given = (self.labels.variables() if self.labels else {}) | dict(recipe.values)
        several = len(self.templates) > 1
        titles = [template.title for template in self.templates]
        self.voters = [
            Voter(f"{model.label}/{titles[index]}" if several else model.label, model, index)
            for model in recipe.all_models
            for index in range(len(self.templates))
        ]
        if doubled := next((title for title in titles if titles.count(title) > 1), None):
            raise DataError(f"templates: two are called {doubled}; give one of them another name or version.")

    @cached_property
    def renderers(self) -> dict[str, Renderer]:
        """By the model's name; a model behind a URL has none."""
        return {m.label: open_renderer(m) for m in self._recipe.all_models if isinstance(m, LocalModelSettings)}

    @property
    def needs_tokens(self) -> bool:
        return self.labels is not None

    def case(self, row: Mapping[str, Any], template: PromptTemplate) -> dict[str, Any]:
        """The variables of one row for one template, and what its demonstrations are chosen by."""
        names = [variable.name for variable in template.variables]
        if template.few_shot is not None:
            names += [name for name in (template.few_shot.key, template.few_shot.category) if name]
        found = {name: row.get(self._recipe.columns.get(name, name)) for name in dict.fromkeys(names)}
        return {name: self._given.get(name) if value is None else value for name, value in found.items()}

    def key(self, row: Mapping[str, Any]) -> bytes | None:
        """Equal for rows that all templates make the same prompt of."""
        cases = [self.case(row, template) for template in self.templates]
        try:
            text = json.dumps(cases, ensure_ascii=False, sort_keys=True)
        except TypeError:  # dates and the like: such a value is no variable's, and the row will say so
            return None
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> list[Asked | DataError]:
        """Every row's prompts, or why it has none."""
        chosen: list[Sequence[Sequence[Mapping[str, Any]]]] = []
        cases = [[self.case(row, template) for row in rows] for template in self.templates]
        for template, mine, demonstrations in zip(self.templates, cases, self._chosen, strict=True):
            del template
            chosen.append(demonstrations.pick_all(mine) if demonstrations else [[] for _ in rows])
        made: list[Asked | DataError] = []
        for row in range(len(rows)):
            try:
                made.append(self._one([mine[row] for mine in cases], [picked[row] for picked in chosen]))
            except DataError as error:
                made.append(error)
        return made

    def _one(self, cases: Sequence[Mapping[str, Any]], examples: Sequence[Sequence[Mapping[str, Any]]]) -> Asked:
        prompts: list[Prompt] = [
            template.render(case, shown)
            for template, case, shown in zip(self.templates, cases, examples, strict=True)
        ]  # fmt: skip
        return Asked(prompts, [self._ids(voter, prompts[voter.template]) for voter in self.voters])

    def _ids(self, voter: Voter, prompt: Prompt) -> Ids | None:
        if not self.needs_tokens or not isinstance(voter.model, LocalModelSettings):
            return None
        renderer = self.renderers[voter.model.label]
        ids = renderer.completion_prompt(prompt) if isinstance(prompt, str) else renderer.prompt(prompt)
        return np.array(ids, dtype=np.int32)

    def content_free(self, content: str) -> Asked | DataError:
        """The prompts with ``content`` in the place of every text of a row; what the recipe gives stays."""
        row = {}
        for template in self.templates:
            for variable in template.variables:
                if variable.type == "string" and variable.name not in self._given and variable.choices is None:
                    row[self._recipe.columns.get(variable.name, variable.name)] = content
        return self.asked([row])[0]

    def label_ids(self, voter: Voter) -> list[list[int]]:
        """Tokens that training would teach this voter's model for each label, the stop token included."""
        assert self.labels is not None and isinstance(voter.model, LocalModelSettings)
        renderer = self.renderers[voter.model.label]
        kind = self.templates[voter.template].kind
        made = []
        for text in self.labels.texts:
            asked: Message = {"role": "user", "content": "x"}
            sample = (
                PromptCompletion("x", text, row_id=text) if kind == "text"
                else Conversation([asked, {"role": "assistant", "content": text}], None, 1, text)
            )  # fmt: skip
            encoded = renderer.encode([sample])[0]
            if isinstance(encoded, BadRow):
                raise DataError(f"labels: {text!r} cannot be taught to {voter.model.label}: {encoded.reason}")
            made.append([int(label) for label in encoded.labels if label != -100])
        return made

    def identity(self) -> dict[str, Any]:
        """What decides the prompts: digests of templates and examples, labels, columns and values."""
        shown = [None if one is None else one.examples for one in self._chosen]
        return {
            "templates": {template.title: template.digest for template in self.templates},
            "examples": _digest(shown),
            "labels": None if self.labels is None else _digest([self.labels.names, self.labels.texts, self._given]),
            "columns": dict(self._recipe.columns),
            "values": dict(self._recipe.values),
        }


def open_renderer(model: LocalModelSettings) -> Renderer:
    """The renderer of a model without its weights. Raises MissingError where there is no such model."""
    folder = find_folder(model.name_or_path, model.revision)
    weights = weights_folder(folder)
    tokenizer = open_tokenizer(weights, trust_remote_code=model.trust_remote_code)
    stops = tuple(configured_stops(weights)) or None
    return Renderer(
        tokenizer, chat_template=model.chat_template, system=system_of(model, folder), stop_ids=stops,
        seq2seq=_is_seq2seq(weights),
    )  # fmt: skip


def _is_seq2seq(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("is_encoder_decoder", False))


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
