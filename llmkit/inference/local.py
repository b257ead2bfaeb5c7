"""The engine ``transformers``: a model in this process, asked through the renderer that its training used."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from llmkit.errors import DataError
from llmkit.inference.engines import Answering, Completion, Question, system_of
from llmkit.inference.generate import Generator, Sampling, open_generator
from llmkit.inference.settings import GenerationSettings, LocalModelSettings
from llmkit.modeling.locate import find_folder


@contextmanager
def open_engine(model: LocalModelSettings, generation: GenerationSettings) -> Iterator[LocalEngine]:
    """See ``engines.open_engine``. Raises MissingError or UsageError for a model that cannot be loaded."""
    folder = find_folder(model.name_or_path, model.revision)
    generator = open_generator(
        folder, system=system_of(model, folder), chat_template=model.chat_template, dtype=model.dtype,
        device=model.device, trust_remote_code=model.trust_remote_code,
    )  # fmt: skip
    engine = LocalEngine(generator, generation)
    try:
        yield engine
    finally:
        del engine, generator
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class LocalEngine:
    """See ``engines.Engine``."""

    def __init__(self, generator: Generator, generation: GenerationSettings) -> None:
        self.generator = generator
        self.notes = list(generator.renderer.notes)
        self._generation = generation

    def answer(self, questions: Sequence[Question], *, logprobs: bool = False) -> Answering:
        settings = self._generation
        sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed, logprobs=logprobs
        )
        ready: list[tuple[int, list[int]]] = []
        for index, question in enumerate(questions):
            try:
                ids = self.generator.prompt_ids(question.prompt)
                self.generator.check_room([ids])
            except DataError as error:
                yield index, Completion("", error=str(error))
            else:
                ready.append((index, ids))
        made = self.generator.batches([ids for _, ids in ready], sampling, batch_size=settings.batch_size)
        for at, answer in made:
            yield ready[at][0], Completion(
                text=answer.text, tokens=len(answer.ids), prompt_tokens=answer.prompt_tokens, seconds=answer.seconds,
                finished=answer.finished, logprob=answer.logprob,
            )  # fmt: skip
