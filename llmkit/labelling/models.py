"""The models of a labelling job, opened when they are first asked: label scores, and answers as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import DataError
from llmkit.inference.engines import Completion, Question, open_engine, system_of
from llmkit.inference.generate import Generator, open_generator
from llmkit.inference.local import LocalEngine
from llmkit.inference.settings import AnsweringModel, GenerationSettings, LocalModelSettings
from llmkit.labelling.scorer import TreeScorer
from llmkit.modeling.locate import find_folder

if TYPE_CHECKING:
    from llmkit.labelling.voters import Voter

LabelTokens = Sequence[Sequence[int]]


class Models:
    """Weights are loaded once for each model and stay loaded. ``tokens`` counts what went through all of them."""

    def __init__(self, generation: GenerationSettings) -> None:
        self._generation = generation
        self._generators: dict[str, Generator] = {}
        self._scorers: dict[tuple[str, tuple[tuple[int, ...], ...]], TreeScorer] = {}
        self._answered = 0

    @property
    def tokens(self) -> int:
        return self._answered + sum(scorer.tokens for scorer in self._scorers.values())

    @property
    def notes(self) -> list[str]:
        return [note for scorer in self._scorers.values() for note in scorer.notes]

    def scorer(self, voter: Voter, labels: LabelTokens) -> TreeScorer:
        """What scores ``labels`` with the voter's model."""
        key = (voter.model.label, tuple(tuple(label) for label in labels))
        if key not in self._scorers:
            assert isinstance(voter.model, LocalModelSettings)
            try:
                self._scorers[key] = TreeScorer(self._generator(voter.model).bare, labels)
            except ValueError as error:
                raise DataError(f"labels: {error}, in the tokens of {voter.model.label}.") from None
        return self._scorers[key]

    def answers(self, model: AnsweringModel, questions: Sequence[Question], sample: int) -> list[Completion]:
        """Answer number ``sample`` (from 0) to every question; each number draws with a seed of its own."""
        generation = self._generation.model_copy(update={"seed": self._generation.seed + sample})
        if isinstance(model, LocalModelSettings):
            engine = LocalEngine(self._generator(model), generation)
            made = dict(engine.answer(questions, logprobs=True))
        else:
            with open_engine(model, generation) as remote:
                made = dict(remote.answer(questions))
        found = [made[index] for index in range(len(questions))]
        self._answered += sum((one.tokens or 0) + (one.prompt_tokens or 0) for one in found)
        return found

    def _generator(self, model: LocalModelSettings) -> Generator:
        if model.label not in self._generators:
            folder = find_folder(model.name_or_path, model.revision)
            self._generators[model.label] = open_generator(
                folder, system=system_of(model, folder), chat_template=model.chat_template, dtype=model.dtype,
                device=model.device, trust_remote_code=model.trust_remote_code,
            )  # fmt: skip
        return self._generators[model.label]


def drawn(logs: NDArray[np.float64], samples: int, seeds: Sequence[int]) -> NDArray[Any]:
    """``samples`` labels [rows, samples] from log-probabilities [rows, labels], every row by its own of the seeds."""
    made = np.empty((len(logs), samples), dtype=np.int64)
    for row, seed in enumerate(seeds):
        shares = np.exp(logs[row] - logs[row].max())
        made[row] = np.random.default_rng(seed).choice(logs.shape[1], size=samples, p=shares / shares.sum())
    return made
