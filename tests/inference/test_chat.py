"""``llmkit chat``: commands, history and messages, by what a person sees."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from llmkit.data.render import Renderer
from llmkit.errors import DataError, MissingError, UsageError
from llmkit.inference.chat import Conversation, chat_loop
from llmkit.inference.generate import Generator, Sampling, load_for_inference


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _conversation(path: Path, out: io.StringIO, system: str | None = None, **sampling: int) -> Conversation:
    model, tokenizer = load_for_inference(path)
    renderer = Renderer(tokenizer, seq2seq=bool(model.config.is_encoder_decoder))
    return Conversation(
        Generator(model, tokenizer, renderer), Sampling(**({"max_new_tokens": 5} | sampling)), out, system
    )


def _said(path: Path, lines: str, *, terminal: bool = True) -> str:
    out = io.StringIO()
    chat_loop(path, in_=Terminal(lines) if terminal else io.StringIO(lines), out=out, max_new_tokens=4)
    return out.getvalue()


def test_one_prompt_is_answered_as_the_generator_would(tiny_llama: Path) -> None:
    out = io.StringIO()
    chat_loop(tiny_llama, prompt="Hi", out=out, max_new_tokens=6)
    model, tokenizer = load_for_inference(tiny_llama)
    expected = Generator(model, tokenizer, Renderer(tokenizer)).answer(
        [{"role": "user", "content": "Hi"}], max_new_tokens=6
    )
    assert out.getvalue().startswith(expected)


def test_commands_are_obeyed_and_unknown_ones_explained(tiny_llama: Path) -> None:
    said = _said(tiny_llama, "/system Be brief.\nHi\n/reset\n/nonsense\n/exit\nnot read\n")
    for expected in ("/reset forgets", "system message set", "a new conversation", "/nonsense is no command"):
        assert expected in said
    assert said.count("> ") == 5


def test_a_run_is_asked_with_the_system_message_it_was_trained_with(tiny_llama: Path, tmp_path: Path) -> None:
    """[7]: the prompt is the training's, whatever ``data.system`` was; ``--system`` wins."""
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "recipe.yaml").write_text("data: {train: rows.jsonl, system: Answer in one word.}\n")

    def said(path: Path, system: str | None) -> str:
        out = io.StringIO()
        chat_loop(path, prompt="Hi", system=system, out=out, max_new_tokens=8)
        return out.getvalue()

    assert said(tmp_path, None) == said(tiny_llama, "Answer in one word.") != said(tiny_llama, None)
    assert said(tmp_path, "") == said(tiny_llama, None)
    (tmp_path / "recipe.yaml").write_text("data: [\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml is not the recipe of a run"):
        said(tmp_path, None)


def test_the_end_of_input_leaves(tiny_llama: Path) -> None:
    assert _said(tiny_llama, "").endswith("> ")


def test_lines_from_a_pipe_are_questions_of_their_own(tiny_llama: Path) -> None:
    once = _said(tiny_llama, "Hi\n", terminal=False)
    assert _said(tiny_llama, "Hi\n\nHi\n", terminal=False) == once * 2
    assert ">" not in once.replace("<|", "").replace("|>", "").split("[cut")[1]


def test_the_history_goes_along_until_it_is_reset(tiny_llama: Path) -> None:
    chat = _conversation(tiny_llama, io.StringIO(), system="Be brief.")
    first = chat.ask("Hi")
    chat.ask("And then?")
    assert [m["role"] for m in chat.history] == ["user", "assistant", "user", "assistant"]
    chat.reset()
    assert chat.ask("Hi") == first


def test_a_conversation_that_outgrows_the_model_drops_its_oldest_turns_and_says_so(tiny_llama: Path) -> None:
    out = io.StringIO()
    chat = _conversation(tiny_llama, out)
    for _ in range(4):
        chat.ask("one two three four five six seven eight nine ten " * 6)
    assert "the oldest" in out.getvalue()
    assert "512 tokens" in out.getvalue()
    with pytest.raises(DataError, match="512"):
        chat.ask("one two three four five " * 200)


def test_too_long_a_question_ends_a_pipe_and_not_a_terminal(tiny_llama: Path) -> None:
    line = "one two three four five " * 200 + "\n"
    assert "the model has room for 512" in _said(tiny_llama, line + "/exit\n")
    with pytest.raises(DataError, match="512"):
        _said(tiny_llama, line, terminal=False)


def test_an_encoder_decoder_can_be_asked(tiny_t5: Path) -> None:
    out = io.StringIO()
    chat_loop(tiny_t5, prompt="translate this", out=out, max_new_tokens=4)
    assert out.getvalue().strip()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no folder"):
        chat_loop(tmp_path / "nothing", prompt="Hi")
