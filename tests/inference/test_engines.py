"""Engines: the local one and the URL give the same answers; what a network does wrong ends well or is told clearly.

The server of these tests answers with a real (tiny) model: see tests/toys/openai_server.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import Served, serve

from llmkit.errors import MissingError, RecipeError
from llmkit.inference import endpoint, engines
from llmkit.inference.engines import Completion, Question, identity, open_engine
from llmkit.inference.generate import Generator, Sampling, open_generator
from llmkit.inference.settings import EndpointSettings, GenerationSettings, LocalModelSettings, as_model
from llmkit.recipe import Recipe, parse

SHORT = GenerationSettings(max_new_tokens=6, batch_size=3)
ASKED = [
    Question([{"role": "user", "content": text}])
    for text in ("Hi", "How many legs has a spider?", "What is the capital of France? " * 4, "한국어 문장")
]


@pytest.fixture(scope="module")
def generator(tiny_llama: Path) -> Generator:
    return open_generator(tiny_llama, device="cpu")


@pytest.fixture
def served(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.01)
    with serve(generator) as state:
        yield state


def ask(
    served: Served, questions: list[Question] = ASKED, generation: GenerationSettings = SHORT, *, logprobs: bool = False,
    **settings: Any,
) -> tuple[list[Completion], list[str]]:  # fmt: skip
    model = EndpointSettings(**{"base_url": served.url, "model": "tiny"} | settings)
    with open_engine(model, generation) as engine:
        made = dict(engine.answer(questions, logprobs=logprobs))
        return [made[index] for index in range(len(questions))], engine.notes


def local(path: Path, questions: list[Question], generation: GenerationSettings, **more: bool) -> list[Completion]:
    with open_engine(LocalModelSettings(name_or_path=str(path), device="cpu"), generation) as engine:
        made = dict(engine.answer(questions, **more))
    return [made[index] for index in range(len(questions))]


# --- local ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_gives_the_answers_of_single_prompts(
    tiny_llama: Path, generator: Generator, temperature: float
) -> None:
    settings = SHORT.model_copy(update={"temperature": temperature, "seed": 5})
    together = local(tiny_llama, ASKED, settings, logprobs=True)
    sampling = Sampling(6, temperature, seed=5, logprobs=True)
    for question, one in zip(ASKED, together, strict=True):
        alone = generator.generate(question.prompt, sampling)
        assert (one.text, one.tokens, one.prompt_tokens) == (alone.text, len(alone.ids), alone.prompt_tokens)
        assert one.logprob == pytest.approx(alone.logprob, abs=1e-4)
        assert one.seconds > 0
    assert local(tiny_llama, ASKED, settings)[0].logprob is None


def test_logprobs_are_those_of_a_plain_forward_pass(generator: Generator) -> None:
    import torch

    made = generator.generate("The quick brown", Sampling(5, logprobs=True))
    ids = generator.prompt_ids("The quick brown")
    with torch.inference_mode():
        logits = generator.model(torch.tensor([ids + made.ids])).logits[0, len(ids) - 1 : -1].float()
    likely = logits.log_softmax(-1)[range(len(made.ids)), made.ids]
    assert made.logprob == pytest.approx(float(likely.mean()), abs=1e-5)


def test_a_prompt_without_room_is_an_error_of_its_own(tiny_llama: Path) -> None:
    made = local(tiny_llama, [Question("word " * 2000), ASKED[0]], SHORT)
    assert made[0].error is not None
    assert "has room for 512" in made[0].error
    assert made[1].error is None


def test_a_neighbour_near_the_end_of_the_context_cuts_nobody_short(generator: Generator) -> None:
    long = generator.prompt_ids("a " * 600)[:508]
    made = dict(generator.batches([long, "Hi"], Sampling(12), batch_size=2))
    assert made[1].ids == generator.generate("Hi", Sampling(12)).ids
    assert len(made[0].ids) <= 4


def test_identity_follows_what_decides_an_answer(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    first = identity(as_model(str(tiny_llama)))
    assert identity(as_model(str(copy))) == first
    assert identity(LocalModelSettings(name_or_path=str(copy), dtype="bfloat16")) != first
    assert identity(LocalModelSettings(name_or_path=str(copy), system="Be kind")) != first
    (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert identity(as_model(str(copy))) != first
    assert identity(EndpointSettings(base_url="http://x", model="m")) is None


def test_every_engine_of_the_table_opens() -> None:
    import importlib

    kinds = {LocalModelSettings.engine, EndpointSettings.engine}
    assert set(engines.ENGINES) == kinds
    assert all(callable(importlib.import_module(module).open_engine) for module in engines.ENGINES.values())


# --- a URL ----------------------------------------------------------------------------------------------------------


def test_a_url_gives_the_answers_of_the_model_behind_it(served: Served, tiny_llama: Path) -> None:
    made, notes = ask(served, logprobs=True, concurrency=2)
    for here, there in zip(local(tiny_llama, ASKED, SHORT, logprobs=True), made, strict=True):
        assert (there.text, there.tokens, there.prompt_tokens) == (here.text, here.tokens, here.prompt_tokens)
        assert there.finished == here.finished
        assert there.logprob == pytest.approx(here.logprob, abs=1e-4)
    assert notes == []
    assert served.most_at_once <= 2


def test_a_text_is_continued(served: Served, generator: Generator) -> None:
    (made,), _ = ask(served, [Question("The quick")], logprobs=True)
    assert made.text == generator.generate("The quick", Sampling(6)).text
    assert made.logprob is not None


def test_failures_are_tried_again(served: Served) -> None:
    served.failures = [(429, {"Retry-After": "0"}), (503, {}), (0, {}), (500, {})]
    made, _ = ask(served, ASKED[:1], max_retries=4)
    assert made[0].error is None
    assert len(served.bodies) == 5


def test_a_server_says_how_long_to_wait(served: Served) -> None:
    served.failures = [(429, {"Retry-After": "0.3"})]
    ask(served, ASKED[:1])
    assert served.times[1] - served.times[0] >= 0.3


def test_retries_end_and_the_error_is_the_cases_own(served: Served) -> None:
    served.failures = [(500, {})] * 3
    made, _ = ask(served, ASKED[:2], max_retries=2, concurrency=1)
    assert made[0].error == "status 500 (after 3 attempts)"
    assert made[1].error is None


def test_a_timeout_is_tried_again(served: Served) -> None:
    served.pause = 0.5
    made, _ = ask(served, ASKED[:1], timeout_seconds=0.1, max_retries=1)
    assert made[0].error is not None
    assert "no answer within 0.1 s" in made[0].error
    assert len(served.bodies) == 2


def test_a_limit_of_requests_is_kept(served: Served) -> None:
    ask(served, ASKED, requests_per_minute=600, concurrency=4)
    gaps = [b - a for a, b in zip(served.times, served.times[1:], strict=False)]
    assert served.times[-1] - served.times[0] >= 0.29, gaps


def test_parameters_that_a_server_does_not_take_are_left_out(served: Served) -> None:
    served.refused = ("response_format", "seed")
    schema = {"type": "object"}
    questions = [Question(question.prompt, schema) for question in ASKED[:2]]
    made, notes = ask(served, questions, concurrency=1)
    assert [one.error for one in made] == [None, None]
    assert [note.split("`")[1] for note in notes] == ["response_format", "seed"]
    assert len(served.bodies) == 4, "the second question is asked without them at once"
    served.refused, served.bodies = (), []
    ask(served, questions[:1])
    assert served.bodies[0]["response_format"]["json_schema"]["schema"] == schema
    ask(served, questions[:1], constrain=False)
    assert "response_format" not in served.bodies[1]


def test_another_name_for_the_length(served: Served) -> None:
    served.refused = ("max_tokens",)
    made, _ = ask(served, ASKED[:2], concurrency=1)
    assert [one.error for one in made] == [None, None]
    assert served.bodies[-1]["max_completion_tokens"] == 6


def test_a_mistake_in_a_question_is_not_tried_again(served: Served) -> None:
    served.failures = [(400, {})]
    made, _ = ask(served, ASKED[:1])
    assert made[0].error == "status 400"
    assert len(served.bodies) == 1


def test_a_server_that_refuses_or_is_away_ends_the_run(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.key = "sk-right"
    with pytest.raises(MissingError, match="refuses a call without a key: set api_key_env"):
        ask(served)
    monkeypatch.setenv("TINY_KEY", "sk-wrong-and-secret")
    with pytest.raises(MissingError, match=r"refuses the key in TINY_KEY \(401") as raised:
        ask(served, api_key_env="TINY_KEY")
    assert "secret" not in str(raised.value)
    monkeypatch.setenv("TINY_KEY", "sk-right")
    assert ask(served, api_key_env="TINY_KEY")[0][0].error is None
    with pytest.raises(MissingError, match=r"LLMKIT_NO_KEY.*is not set"):
        ask(served, api_key_env="LLMKIT_NO_KEY")
    with pytest.raises(MissingError, match=r"no such model or address.*does not exist"):
        ask(served, api_key_env="TINY_KEY", model="other")
    with pytest.raises(MissingError, match="cannot be reached"):
        ask(served, base_url="http://127.0.0.1:9/v1", max_retries=1)


class _Models(Recipe):
    """A recipe with models."""

    models: list[str | LocalModelSettings | EndpointSettings]
    """Models."""


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"base_url": "localhost:8000", "model": "m"}, "is no URL"),
        ({"base_url": "http://x/v1/chat/completions", "model": "m"}, "leave out /chat/completions"),
        (
            {"base_url": "http://x/v1", "model": "m", "api_key_env": "not a name"},
            "not the name of an environment variable",
        ),
        ({"base_url": "http://x/v1", "model": "m", "api_key": "x"}, "unknown key"),
        ({"name_or_path": "x", "device": 1}, "expected text"),
    ],
)
def test_mistakes_in_a_model(written: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse({"name": "x", "models": [written]}, _Models)
