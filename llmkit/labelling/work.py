"""Labelling as a batch job: rows of a file to votes (see ``llmkit.inference.batch``). ``finish`` makes labels of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmkit.errors import DataError, LlmkitError
from llmkit.inference.batch.shards import write_atomic
from llmkit.inference.batch.work import Computed, RowError
from llmkit.inference.engines import Completion, Question, identity, require
from llmkit.inference.settings import EndpointSettings
from llmkit.labelling.agreement import MISSING
from llmkit.labelling.budget import Budget
from llmkit.labelling.calibrate import Scores, bias_of, normalised, probabilities
from llmkit.labelling.voters import Asked, Prompts, Voter

if TYPE_CHECKING:
    from llmkit.labelling.models import Models
    from llmkit.labelling.scorer import TreeScorer
    from llmkit.stages.label import Recipe

PROMPT, VOTES, PROBABILITIES, ANSWERS, CONFIDENCES = (
    "llmkit_prompt", "llmkit_votes", "llmkit_probabilities", "llmkit_answers", "llmkit_confidences",
)  # fmt: skip
CALIBRATION = "calibration.json"
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


class LabelWork:
    """See ``llmkit.inference.batch.work.Work``.

    With labels a row gets ``llmkit_votes`` [voters × samples], indices of labels (-1 for none), and
    ``llmkit_probabilities`` [voters × labels]; else ``llmkit_answers`` and ``llmkit_confidences`` [voters × samples].
    ``llmkit_prompt`` is the first template's, as messages or as text.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Raises RecipeError, DataError or MissingError for templates, labels and models that cannot be used."""
        self._recipe = recipe
        self._prompts = Prompts(recipe)
        self._budget = Budget(recipe.budget, Path(recipe.output_dir))
        for model in recipe.all_models:
            require(model)

    @property
    def prompts(self) -> Prompts:
        return self._prompts

    @cached_property
    def _models(self) -> Models:
        from llmkit.labelling.models import Models  # torch, which the process that prepares does without

        return Models(self._recipe.generation)

    def schema(self) -> pa.Schema:
        chat = self._prompts.templates[0].kind == "chat"
        fields = [(PROMPT, pa.list_(_MESSAGE) if chat else pa.string())]
        votes = len(self._prompts.voters) * self._recipe.samples
        if self._prompts.labels is None:
            fields += [(ANSWERS, pa.list_(pa.string(), votes)), (CONFIDENCES, pa.list_(pa.float32(), votes))]
        else:
            shares = len(self._prompts.voters) * len(self._prompts.labels)
            fields += [(VOTES, pa.list_(pa.int32(), votes)), (PROBABILITIES, pa.list_(pa.float32(), shares))]
        return pa.schema(fields)

    def identity(self) -> Mapping[str, Any]:
        recipe = self._recipe
        models = {
            m.label: [m.base_url, m.model] if isinstance(m, EndpointSettings) else identity(m) for m in recipe.all_models
        }  # fmt: skip
        return {
            "models": models, "method": recipe.method, "samples": recipe.samples, "seed": recipe.seed,
            "scoring": recipe.scoring.model_dump(), "generation": recipe.generation.model_dump(),
            **self._prompts.identity(),
        }  # fmt: skip

    def key(self, row: Mapping[str, Any]) -> bytes | None:
        return self._prompts.key(row)

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        return [RowError(str(one)) if isinstance(one, DataError) else one for one in self._prompts.asked(rows)]

    def compute(self, prepared: Sequence[Asked]) -> Computed:
        self._budget.check(sum(len(ids) for one in prepared for ids in one.ids if ids is not None))
        before = self._models.tokens
        errors: dict[int, str] = {}
        made = self._answers(prepared, errors) if self._prompts.labels is None else self._votes(prepared, errors)
        columns = {PROMPT: [one.prompts[0] for one in prepared], **made}
        return Computed(columns, errors, self._models.tokens - before)

    # ---- labels ----

    def _votes(self, prepared: Sequence[Asked], errors: dict[int, str]) -> dict[str, Any]:
        assert self._prompts.labels is not None
        samples, labels = self._recipe.samples, len(self._prompts.labels)
        shape = (len(prepared), len(self._prompts.voters))
        votes = np.full((*shape, samples), MISSING, dtype=np.int32)
        shares = np.full((*shape, labels), np.nan, dtype=np.float32)
        for number, voter in enumerate(self._prompts.voters):
            if isinstance(voter.model, EndpointSettings):
                votes[:, number] = self._asked_labels(voter, prepared, errors)
                continue
            scorer = self._scorer(number)
            good = self._with_room(scorer, number, prepared, errors)
            if good:
                ids = [prepared[row].ids[number] for row in good]
                votes[good, number], shares[good, number] = self._scored(number, scorer, ids)
        return {VOTES: votes.reshape(len(prepared), -1), PROBABILITIES: shares.reshape(len(prepared), -1)}

    def _scored(self, number: int, scorer: TreeScorer, ids: Sequence[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Votes [rows, samples] and probabilities [rows, labels] of one voter."""
        nodes = scorer.nodes(ids)
        if self._recipe.method == "score":
            scores = normalised(scorer.tree.sums(nodes), scorer.tree.lengths, self._recipe.scoring.normalize)
            found = probabilities(scores, self._biases[number], self._recipe.scoring.temperature)
            return found.argmax(1)[:, None], found
        temperature = self._recipe.generation.temperature
        if temperature == 0:
            greedy = scorer.tree.greedy(nodes)
            return greedy[:, None], np.exp(scorer.tree.walked(nodes))
        logs = scorer.tree.walked(nodes, temperature)
        seeds = [_seed(one, self._recipe.generation.seed) for one in ids]
        from llmkit.labelling.models import drawn

        return drawn(logs, self._recipe.samples, seeds), np.exp(logs)

    def _with_room(
        self, scorer: TreeScorer, number: int, prepared: Sequence[Asked], errors: dict[int, str]
    ) -> list[int]:
        good = []
        for row, one in enumerate(prepared):
            try:
                scorer.check(one.ids[number])  # type: ignore[arg-type]
                good.append(row)
            except DataError as error:
                errors[row] = str(error)
        return good

    def _asked_labels(self, voter: Voter, prepared: Sequence[Asked], errors: dict[int, str]) -> NDArray[np.int32]:
        """Votes [rows, samples] of a model behind a URL: its answers, read as labels."""
        assert self._prompts.labels is not None
        votes = np.full((len(prepared), self._recipe.samples), MISSING, dtype=np.int32)
        for sample in range(self._recipe.samples):
            for row, answer in enumerate(self._ask(voter, prepared, sample)):
                if answer.error is not None:
                    errors[row] = f"{voter.name}: {answer.error}"
                else:
                    votes[row, sample] = self._prompts.labels.read_answer(answer.text)
        return votes

    def _scorer(self, number: int) -> TreeScorer:
        return self._models.scorer(self._prompts.voters[number], self._label_ids[number])

    @cached_property
    def _label_ids(self) -> list[list[list[int]]]:
        return [
            [] if isinstance(voter.model, EndpointSettings) else self._prompts.label_ids(voter)
            for voter in self._prompts.voters
        ]  # fmt: skip

    @cached_property
    def _biases(self) -> list[Scores | None]:
        """The bias of each voter's labels, kept in the run's folder: a start after a kill goes on with the same."""
        if self._recipe.scoring.calibration == "none":
            return [None] * len(self._prompts.voters)
        path = Path(self._recipe.output_dir) / CALIBRATION
        if not path.is_file():
            asked = self._calibration_rows()
            found = {voter.name: list(self._bias(n, asked)) for n, voter in enumerate(self._prompts.voters)}
            write_atomic(path, json.dumps(found, ensure_ascii=False, indent=1))
        kept = json.loads(path.read_text(encoding="utf-8"))
        return [np.array(kept[voter.name]) for voter in self._prompts.voters]

    def _bias(self, number: int, asked: Sequence[Asked]) -> Scores:
        scorer = self._scorer(number)
        nodes = scorer.nodes([one.ids[number] for one in asked])  # type: ignore[misc]
        return bias_of(normalised(scorer.tree.sums(nodes), scorer.tree.lengths, self._recipe.scoring.normalize))

    def _calibration_rows(self) -> list[Asked]:
        from llmkit.inference.batch.reading import rows_of

        scoring = self._recipe.scoring
        if scoring.calibration == "contextual":
            found = [self._prompts.content_free(content) for content in scoring.content_free]
            key, need = "scoring.content_free", 1
        else:
            found = self._prompts.asked(list(islice(rows_of(self._recipe.input), scoring.calibration_rows)))
            key, need = "scoring.calibration_rows", 2
        good = [one for one in found if isinstance(one, Asked)]
        if len(good) < need:
            why = next((str(one) for one in found if isinstance(one, LlmkitError)), "the input has too few rows")
            raise DataError(f"{key}: there is nothing to calibrate by: {why}")
        return good

    # ---- texts ----

    def _answers(self, prepared: Sequence[Asked], errors: dict[int, str]) -> dict[str, Any]:
        samples = self._recipe.samples
        texts: list[list[str | None]] = [[] for _ in prepared]
        sure: list[list[float]] = [[] for _ in prepared]
        for voter in self._prompts.voters:
            for sample in range(samples):
                for row, answer in enumerate(self._ask(voter, prepared, sample)):
                    if answer.error is not None:
                        errors[row] = f"{voter.name}: {answer.error}"
                    # an answer that was cut is no answer: half a JSON object, half a sentence
                    texts[row].append(answer.text.strip() if answer.finished and answer.error is None else None)
                    sure[row].append(float(np.exp(answer.logprob)) if answer.logprob is not None else float("nan"))
        return {ANSWERS: texts, CONFIDENCES: np.array(sure, dtype=np.float32)}

    def _ask(self, voter: Voter, prepared: Sequence[Asked], sample: int) -> list[Completion]:
        schema = self._prompts.templates[voter.template].output_schema
        questions = [Question(one.prompts[voter.template], schema) for one in prepared]
        return self._models.answers(voter.model, questions, sample)


def _seed(ids: NDArray[np.int32], seed: int) -> int:
    """A seed of a prompt and the recipe's, so that a row's samples do not depend on the rows beside it."""
    return int.from_bytes(hashlib.sha256(ids.tobytes() + seed.to_bytes(8, "little")).digest()[:8], "little")
