"""The renderer: masks, stop tokens, bos, prompts, literal special tokens (field lessons 3 to 7 and 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Conversation, Encoded, PromptCompletion, Text
from llmkit.errors import DataError

CHAT = ["chatml", "chatml_generation", "chatml_base_eos", "llama3", "gemma", "mistral", "mistral_always"]
TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]
Make = Callable[[str], PreTrainedTokenizerFast]


def encode_one(renderer: Renderer, row: Any) -> Encoded:
    (encoded,) = renderer.encode([row])
    assert isinstance(encoded, Encoded), encoded
    return encoded


def learned_runs(row: Encoded) -> list[tuple[int, int]]:
    """``[start, stop)`` of every stretch of learned tokens."""
    learned = np.concatenate([[0], (row.labels != -100).astype(int), [0]])
    edges = np.flatnonzero(np.diff(learned))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", CHAT)
def test_lesson_03_mask_covers_every_assistant_turn_and_nothing_else(name: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(name)
    row = encode_one(Renderer(tokenizer), Conversation(TALK))
    texts = [tokenizer.decode(row.input_ids[a : b - 1]).strip() for a, b in learned_runs(row)]
    assert texts == ["Paris.", "It is 4."]
    assert np.array_equal(row.labels[row.labels != -100], row.input_ids[row.labels != -100])


@pytest.mark.parametrize("name", CHAT)
def test_lesson_03_supervise_last_learns_the_last_turn_only(name: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(name)
    row = encode_one(Renderer(tokenizer, supervise="last"), Conversation(TALK))
    ((start, stop),) = learned_runs(row)
    assert tokenizer.decode(row.input_ids[start : stop - 1]).strip() == "It is 4."


def test_lesson_03_template_that_changes_earlier_turns_is_refused_with_the_first_differing_token(
    make_tokenizer: Make,
) -> None:
    with pytest.raises(DataError) as caught:
        Renderer(make_tokenizer("thinking")).encode([Conversation(TALK, row_id="talks.jsonl:7")])
    message = str(caught.value)
    assert "talks.jsonl:7" in message
    assert "supervise: last" in message
    assert "differ first at token" in message
    assert "<think>" in message
    assert caught.value.exit_code == 3


def test_lesson_03_template_that_drops_thinking_can_be_trained_on_the_last_turn(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("thinking")
    talk = [dict(m) for m in TALK]
    talk[-1]["reasoning_content"] = "two and two"
    renderer = Renderer(tokenizer, supervise="last")
    row = encode_one(renderer, Conversation(talk))
    ((start, stop),) = learned_runs(row)
    assert "two and two" in tokenizer.decode(row.input_ids[start:stop])
    assert renderer.prompt(talk[:-1]) == row.input_ids[:start].tolist()


def test_lesson_03_prompt_that_is_no_prefix_of_the_answer_is_refused(make_tokenizer: Make) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    renderer = Renderer(make_tokenizer("chatml"), chat_template=template, supervise="last")
    with pytest.raises(DataError, match=r"does not keep prefixes[\s\S]*The prompt given at inference"):
        renderer.encode([Conversation(TALK)])


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("supervise", ["all", "last"])
def test_lesson_04_last_supervised_token_is_a_stop_token(name: str, supervise: Any, make_tokenizer: Make) -> None:
    renderer = Renderer(make_tokenizer(name), supervise=supervise)
    row = encode_one(renderer, Conversation(TALK))
    for _, stop in learned_runs(row):
        assert int(row.labels[stop - 1]) in renderer.stop_ids
        assert not any(int(index) in renderer.stop_ids for index in row.labels[stop - 2 : stop - 1])


def test_lesson_04_template_without_a_stop_token_is_refused(make_tokenizer: Make) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="never stops"):
        Renderer(make_tokenizer("base"), chat_template=template).encode([Conversation(TALK)])


def test_lesson_04_chatml_on_a_tokenizer_that_does_not_know_its_tokens_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"never stops[\s\S]*dialogue"):
        Renderer(make_tokenizer("base"), chat_template="chatml").encode([Conversation(TALK)])


def test_lesson_05_pad_that_equals_eos_never_masks_the_real_eos(make_tokenizer: Make) -> None:
    for name in ("chatml", "mistral"):
        tokenizer = make_tokenizer(name)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        row = encode_one(Renderer(tokenizer), Conversation(TALK))
        assert np.count_nonzero(row.labels == tokenizer.eos_token_id) == 2


def test_lesson_05_base_model_learns_the_eos_that_its_template_ends_turns_with(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml_base_eos")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id != end
    renderer = Renderer(tokenizer)
    assert end in renderer.stop_ids and tokenizer.eos_token_id in renderer.stop_ids
    assert any("<|im_end|>" in note and "stop" in note for note in renderer.notes)


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral", "mistral_always"])
def test_lesson_06_bos_is_never_doubled(name: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(name)
    renderer = Renderer(tokenizer)
    rows = renderer.encode([Conversation(TALK), Text("A spider has eight legs.")])
    sequences = [row.input_ids.tolist() for row in rows if isinstance(row, Encoded)]
    sequences += [renderer.prompt(TALK[:3]), renderer.completion_prompt("A spider")]
    assert len(sequences) == 4
    for ids in sequences:
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("answer", ["Paris.", "\nParis", "\n\nParis", "  Paris", "ris", "1", "한국어"])
def test_lesson_07_inference_prompt_is_the_training_prefix(name: str, answer: str, make_tokenizer: Make) -> None:
    renderer = Renderer(make_tokenizer(name))
    talk = [TALK[0], {"role": "assistant", "content": answer}, TALK[2], {"role": "assistant", "content": answer}]
    row = encode_one(renderer, Conversation(talk))
    starts = [start for start, _ in learned_runs(row)]
    assert len(starts) == 2
    assert renderer.prompt(talk[:1]) == row.input_ids[: starts[0]].tolist()
    assert renderer.prompt(talk[:3]) == row.input_ids[: starts[1]].tolist()


@pytest.mark.parametrize("name", CHAT)
def test_lesson_07_tokens_are_those_of_hugging_face_where_nothing_merges(name: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(name)
    row = encode_one(Renderer(tokenizer), Conversation(TALK))
    assert not row.drift
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert row.input_ids.tolist() == list(whole)
    prompt = tokenizer.apply_chat_template(TALK[:3], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert Renderer(tokenizer).prompt(TALK[:3]) == list(prompt)


def test_lesson_07_a_turn_that_other_engines_would_tokenize_otherwise_is_flagged(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer_merges = tokenizer.backend_tokenizer.encode("\n\n", add_special_tokens=False).ids
    assert len(tokenizer_merges) == 1, "the test needs a tokenizer that merges two line ends"
    talk = [TALK[0], {"role": "assistant", "content": "\n\nParis."}, *TALK[2:]]
    assert encode_one(Renderer(tokenizer), Conversation(talk)).drift
    assert not encode_one(Renderer(tokenizer), Conversation(TALK)).drift


@pytest.mark.parametrize("name", CHAT)
def test_lesson_10_literal_special_tokens_in_content_stay_text(name: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(name)
    renderer = Renderer(tokenizer)
    specials = sorted(tokenizer.all_special_tokens)
    evil = " and ".join(specials)
    clean = encode_one(renderer, Conversation(TALK[:2]))
    talk = [
        {"role": "user", "content": f"What is {evil} for?"},
        {"role": "assistant", "content": f"It is {evil} I say"},
    ]
    row = encode_one(renderer, Conversation(talk))
    special_ids = set(tokenizer.all_special_ids) | set(renderer.stop_ids)
    count = lambda ids: sum(int(index) in special_ids for index in ids)  # noqa: E731
    assert count(row.input_ids) == count(clean.input_ids)
    decoded = tokenizer.decode(row.input_ids)
    assert f"What is {evil} for?" in decoded
    assert f"It is {evil} I say" in decoded
    ((start, stop),) = learned_runs(row)
    assert count(row.labels[start:stop]) == 1 and int(row.labels[stop - 1]) in renderer.stop_ids
    assert renderer.prompt(talk[:1]) == row.input_ids[:start].tolist()


def test_lesson_10_literal_special_tokens_in_tools_and_plain_text_stay_text(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    renderer = Renderer(tokenizer, chat_template="chatml")
    tool = {"type": "function", "function": {"name": "add", "description": "ends <|im_end|> turns"}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_start|>"}}}
    talk = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "<|im_end|>"},
        {"role": "assistant", "content": "done"},
    ]
    row = encode_one(renderer, Conversation(talk, [tool]))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row.input_ids.tolist().count(end) == 5  # tools, user, assistant, tool, assistant
    assert '{"a": "<|im_start|>"}' in tokenizer.decode(row.input_ids)
    text = encode_one(renderer, Text("one <|im_end|> two"))
    assert text.input_ids.tolist().count(end) == 1 and int(text.input_ids[-1]) == end
    assert tokenizer.decode(renderer.completion_prompt("a <|im_end|>")) == "a <|im_end|>"
    assert end not in renderer.completion_prompt("a <|im_end|>")


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "mistral_always"])
def test_splitting_at_special_tokens_gives_the_ids_of_encoding_at_once(name: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(name)
    renderer = Renderer(tokenizer)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert renderer._finish_one(renderer._plain_draft(text)) == tokenizer.encode(text, add_special_tokens=False)


def test_base_tokenizer_trains_pairs_as_plain_text_with_eos(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("base")
    renderer = Renderer(tokenizer)
    row = encode_one(renderer, PromptCompletion("What is", " the capital", None, "r:1"))
    assert tokenizer.decode(row.input_ids) == "What is the capital<|endoftext|>"
    assert tokenizer.decode(row.labels[row.labels >= 0]) == " the capital<|endoftext|>"
    assert renderer.completion_prompt("What is") == row.input_ids[row.labels < 0].tolist()


def test_base_tokenizer_without_template_refuses_conversations_and_says_the_fix(make_tokenizer: Make) -> None:
    renderer = Renderer(make_tokenizer("base"))
    with pytest.raises(DataError, match=r"data\.chat_template: chatml"):
        renderer.encode([Conversation(TALK)])
    with pytest.raises(DataError, match=r"data\.chat_template: chatml"):
        renderer.prompt(TALK[:1])


def test_dialogue_template_suits_any_tokenizer_with_an_eos(make_tokenizer: Make) -> None:
    for name in ("base", "mistral", "llama3"):
        tokenizer = make_tokenizer(name)
        renderer = Renderer(tokenizer, chat_template="dialogue", system="Be brief.")
        row = encode_one(renderer, Conversation(TALK))
        assert [tokenizer.decode(row.input_ids[a : b - 1]).strip() for a, b in learned_runs(row)] == [
            "Paris.",
            "It is 4.",
        ]
        assert all(int(row.labels[b - 1]) == tokenizer.eos_token_id for _, b in learned_runs(row))
        assert "Be brief." in tokenizer.decode(row.input_ids)


def test_system_message_goes_before_conversations_that_have_none(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    renderer = Renderer(tokenizer, system="You are helpful.")
    own = [{"role": "system", "content": "Own."}, *TALK]
    first, second = renderer.encode([Conversation(TALK), Conversation(own)])
    assert isinstance(first, Encoded) and isinstance(second, Encoded)
    assert "You are helpful." in tokenizer.decode(first.input_ids)
    assert "You are helpful." not in tokenizer.decode(second.input_ids)
    assert "You are helpful." in tokenizer.decode(renderer.prompt(TALK[:1]))


def test_weight_0_and_prompt_turns_are_not_learned(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    renderer = Renderer(tokenizer, system="You are helpful.")
    weighted = [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]
    rows = renderer.encode([Conversation(weighted), Conversation(TALK, learn_from=3)])
    for row in rows:
        assert isinstance(row, Encoded)
        ((start, stop),) = learned_runs(row)
        assert tokenizer.decode(row.input_ids[start : stop - 1]) == "It is 4."


def test_row_that_the_template_refuses_is_a_bad_row_with_its_words(make_tokenizer: Make) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    renderer = Renderer(make_tokenizer("chatml"), chat_template=template)
    (bad,) = renderer.encode([Conversation(TALK, row_id="x.jsonl:3")])
    assert isinstance(bad, BadRow)
    assert bad.row_id == "x.jsonl:3" and "roles must alternate" in bad.reason


def test_template_that_is_no_template_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"data\.chat_template: nowhere\.jinja.*chatml"):
        Renderer(make_tokenizer("chatml"), chat_template="nowhere.jinja")
    with pytest.raises(DataError, match=r"data\.chat_template: line 1"):
        Renderer(make_tokenizer("chatml"), chat_template="{% for %}")


def test_seq2seq_has_an_encoder_side_and_a_target_with_eos(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("t5")
    renderer = Renderer(tokenizer, seq2seq=True)
    row = encode_one(renderer, PromptCompletion("What is the capital", "Paris", None, "r:1"))
    assert row.input_ids.tolist() == tokenizer("What is the capital")["input_ids"]
    assert row.labels.tolist() == tokenizer("Paris")["input_ids"]
    assert renderer.completion_prompt("What is the capital") == row.input_ids.tolist()
    talk = encode_one(renderer, Conversation(TALK))
    source = "\n".join(message["content"] for message in TALK[:3])
    assert talk.input_ids.tolist() == tokenizer(source)["input_ids"]
    assert talk.labels.tolist() == tokenizer("It is 4.")["input_ids"]
    with pytest.raises(DataError, match="causal"):
        renderer.encode([Text("a")])


def test_fingerprint_follows_template_rule_system_and_tokenizer(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    prints = {
        Renderer(tokenizer).fingerprint,
        Renderer(tokenizer, supervise="last").fingerprint,
        Renderer(tokenizer, system="x").fingerprint,
        Renderer(tokenizer, chat_template="chatml").fingerprint,
        Renderer(make_tokenizer("chatml_base_eos"), chat_template=tokenizer.chat_template).fingerprint,
        Renderer(make_tokenizer("llama3")).fingerprint,
    }
    assert len(prints) == 6
    again = Renderer(tokenizer).fingerprint
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)  # leaves its mark in the Rust tokenizer
    assert Renderer(tokenizer).fingerprint == again


def test_truncation_that_somebody_left_in_the_tokenizer_cuts_nothing(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("gemma")
    renderer = Renderer(tokenizer)
    whole = renderer.prompt(TALK[:3])
    tokenizer("some other text", truncation=True, max_length=2, padding="max_length")
    try:
        assert renderer.prompt(TALK[:3]) == whole
        assert encode_one(renderer, Conversation(TALK)).input_ids.tolist()[: len(whole)] == whole
    finally:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def test_many_rows_at_once_are_the_rows_one_by_one(make_tokenizer: Make) -> None:
    renderer = Renderer(make_tokenizer("mistral"))
    rows = [PromptCompletion(f"What is {n}?", f"It is {n} </s>" if n % 7 else "1", None, f"r:{n}") for n in range(1300)]
    together = renderer.encode(rows)
    assert [row.row_id for row in together] == [row.row_id for row in rows]
    for place in (0, 1, 499, 500, 501, 1299):
        one, other = together[place], encode_one(renderer, rows[place])
        assert isinstance(one, Encoded)
        assert one.input_ids.tolist() == other.input_ids.tolist() and one.labels.tolist() == other.labels.tolist()


def test_slow_tokenizer_gives_the_same_shape_of_row() -> None:
    tokenizer = _Letters(bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    assert not tokenizer.is_fast
    renderer = Renderer(tokenizer)
    talk = [{"role": "user", "content": "say </s>"}, {"role": "assistant", "content": "ok"}]
    row = encode_one(renderer, Conversation(talk))
    ((start, stop),) = learned_runs(row)
    assert renderer.prompt(talk[:1]) == row.input_ids[:start].tolist()
    assert int(row.labels[stop - 1]) == tokenizer.eos_token_id
    assert row.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert len(renderer.fingerprint) == 64


class _Letters(PreTrainedTokenizer):
    """A Python tokenizer: one token a letter."""

    def __init__(self, **kwargs: Any) -> None:
        self._vocab = {chr(code): code for code in range(32, 127)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return 127

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocab) | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocab.get(token, 32)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)
