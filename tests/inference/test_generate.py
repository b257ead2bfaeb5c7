"""Answers: equal to transformers' own, one by one or in a batch, stopped where the model stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.data.render import Renderer
from llmkit.errors import DataError, MissingError, UsageError
from llmkit.inference.generate import Generator, Sampling, load_for_inference

QUESTIONS = ["How many legs has a spider?", "Hi", "What is the capital of France, and what is 12 times 4?"]


def _generator(path: Path, **renderer: Any) -> Generator:
    model, tokenizer = load_for_inference(path)
    seq2seq = bool(model.config.is_encoder_decoder)
    return Generator(model, tokenizer, Renderer(tokenizer, seq2seq=seq2seq, **renderer))


def _messages(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}]


def _never_stops(generator: Generator) -> Generator:
    generator.stop_ids = frozenset()
    return generator


@pytest.mark.parametrize("source", ["tiny_llama", "tiny_qwen", "tiny_t5"])
def test_greedy_answers_are_those_of_transformers(source: str, request: pytest.FixtureRequest) -> None:
    generator = _never_stops(_generator(request.getfixturevalue(source)))
    prompt = generator.prompt_ids(QUESTIONS[0])
    ours = generator.generate(prompt, Sampling(max_new_tokens=12)).ids
    model: Any = generator.model
    model.generation_config.eos_token_id = None
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert theirs[0, -12:].tolist() == ours


@pytest.mark.parametrize("source", ["tiny_llama", "tiny_qwen", "tiny_t5"])
def test_a_batch_answers_like_one_by_one(source: str, request: pytest.FixtureRequest) -> None:
    """Whatever the padding."""
    generator = _never_stops(_generator(request.getfixturevalue(source)))
    alone = [generator.answer(question, max_new_tokens=10) for question in QUESTIONS]
    assert generator.answer_batch(QUESTIONS, max_new_tokens=10) == alone
    assert generator.answer_batch(QUESTIONS, batch_size=3, max_new_tokens=10) == alone
    assert len(set(alone)) > 1


def test_an_answer_ends_at_a_stop_token_which_is_not_shown(tiny_llama: Path) -> None:
    generator = _never_stops(_generator(tiny_llama))
    prompt = _messages(QUESTIONS[0])
    ids = generator.generate(prompt, Sampling(max_new_tokens=10)).ids
    generator.stop_ids = frozenset({ids[4]})
    answer = generator.generate(prompt, Sampling(max_new_tokens=10))
    assert answer.finished
    assert answer.ids == ids[: ids.index(ids[4]) + 1]
    assert answer.text == generator.tokenizer.decode(answer.ids[:-1], skip_special_tokens=True)


def test_the_prompt_is_the_renderers(tiny_llama: Path) -> None:
    """[7], issues LLaMA-Factory #8720, unsloth #1832: one renderer for training and inference."""
    generator = _generator(tiny_llama, system="Be brief.")
    ids = generator.prompt_ids(_messages("Hi"))
    assert ids == generator.renderer.prompt(_messages("Hi"))
    assert generator.tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.")
    assert generator.prompt_ids(ids) == ids


def test_the_stream_is_the_answer(tiny_llama: Path) -> None:
    generator = _never_stops(_generator(tiny_llama))
    pieces: list[str] = []
    text = generator.answer(_messages(QUESTIONS[2]), on_text=pieces.append, max_new_tokens=30)
    assert len(pieces) > 3
    assert "".join(pieces) == text


def test_sampling_is_decided_by_its_seed(tiny_llama: Path) -> None:
    generator = _never_stops(_generator(tiny_llama))

    def sample(seed: int, top_p: float = 1.0) -> list[int]:
        settings = Sampling(max_new_tokens=12, temperature=1.5, top_p=top_p, seed=seed)
        return generator.generate(_messages("Hi"), settings).ids

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.rand(2), expected)
    greedy = generator.generate(_messages("Hi"), Sampling(max_new_tokens=12)).ids
    assert sample(5, top_p=1e-6) == greedy


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="max_new_tokens"):
        Sampling(**wrong)


def test_a_prompt_without_room_is_refused_and_the_answer_fits(tiny_llama: Path) -> None:
    generator = _never_stops(_generator(tiny_llama))
    assert generator.context == 512
    with pytest.raises(DataError, match="512"):
        generator.answer([5] * 512)
    assert len(generator.generate([5] * 505, Sampling(max_new_tokens=50)).ids) == 7
    with pytest.raises(DataError, match="no tokens"):
        generator.answer([])


def test_a_model_in_training_is_put_back(tiny_llama: Path) -> None:
    generator = _generator(tiny_llama)
    generator.model.train()
    generator.model.config._attn_implementation = "something_registered_for_training"
    generator.answer(_messages("Hi"), max_new_tokens=2)
    assert generator.model.training
    assert generator.model.config._attn_implementation == "something_registered_for_training"


def test_an_adapter_answers_on_its_base(tiny_qwen: Path, tmp_path: Path) -> None:
    from llmkit.modeling.adapters import attach
    from llmkit.modeling.export import save_adapter
    from llmkit.modeling.load import load_model, load_tokenizer
    from llmkit.modeling.locate import describe_base
    from llmkit.modeling.settings import AdapterSettings, ModelSettings

    recipe = ModelSettings(name_or_path=str(tiny_qwen))
    tokenizer = load_tokenizer(recipe)
    peft_model = attach(load_model(recipe, tokenizer=tokenizer, seed=0), AdapterSettings(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.full_like(parameter, 0.2))
    base = describe_base(recipe, rows=tokenizer.vocab_size + 24, dtype="float32")
    save_adapter(peft_model, tokenizer, tmp_path / "run" / "adapter", base, stop_ids=[2])
    prompt = list(range(10, 20))
    in_memory = Generator(peft_model, tokenizer, Renderer(tokenizer))
    reopened = _generator(tmp_path / "run")
    expected = _never_stops(in_memory).answer(prompt, max_new_tokens=8)
    assert _never_stops(reopened).answer(prompt, max_new_tokens=8) == expected
    assert _never_stops(_generator(tiny_qwen)).answer(prompt, max_new_tokens=8) != expected


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="neither a run nor a model"):
        load_for_inference(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: x")
    with pytest.raises(MissingError, match="has not finished"):
        load_for_inference(tmp_path)


def test_the_demo_model_answers_and_stops(demo_model: Path) -> None:
    generator = _generator(demo_model)
    answer = generator.generate(_messages("What is the capital of France?"), Sampling(max_new_tokens=20))
    assert answer.finished
    assert "Paris" in answer.text
