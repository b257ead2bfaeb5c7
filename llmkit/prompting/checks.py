"""The static checks: each looks at one view of a case, or once at a model's template, and says what is wrong.

All of them work from what is rendered and tokenized, none from the name of a model. Text is compared first, because
that explains best; then token ids, because that is what counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from llmkit.data.render import IGNORED
from llmkit.data.rows import Conversation, Message
from llmkit.errors import DataError
from llmkit.prompting.report import Severity
from llmkit.prompting.views import Bench, View, segments, thinking_of, visible
from llmkit.prompting.vllm_inputs import message_form, tool_form

_TAG = re.compile(r"<\|?/?(?:think|thinking|reasoning|thought)\|?>|\[/?THINK\]|◁/?think▷", re.IGNORECASE)
_CHANNEL = re.compile(r"<\|channel\|>\w+<\|message\|>")
_THOUGHT_OR_TOOL = re.compile(r"think|tool|reason|thought|function|call", re.IGNORECASE)


class Found(NamedTuple):
    """One thing that a check found; ``message`` is the same for every case that has it, ``detail`` is the case's own."""

    check: str
    severity: Severity
    message: str
    detail: str = ""


# ---- one case, as text ----


class Turn(NamedTuple):
    """An answer in the rendered text: the history before it without and with the generation prompt, and with it."""

    at: int
    history: str | None
    prompt: str
    upto: str


def render_turns(view: View, bench: Bench) -> tuple[list[Turn], str]:
    """The learned turns of a view as text, and the whole text. Raises ValueError when the template refuses."""
    assert bench.chat is not None
    messages, tools = view.messages, view.tools
    whole = bench.chat.render(messages, tools, prompt=False)
    turns = []
    for index in view.turns:
        prompt = bench.chat.render(messages[:index], tools, prompt=True) if index else ""
        try:
            history = bench.chat.render(messages[:index], tools, prompt=False) if index else ""
        except ValueError:
            history = None  # e.g. a template that wants an answer after every question
        upto = whole if index == view.last else bench.chat.render(messages[: index + 1], tools, prompt=False)
        turns.append(Turn(index, history, prompt, upto))
    return turns, whole


def check_text(view: View, bench: Bench) -> Iterator[Found]:
    """Everything about a chat that its text alone shows."""
    try:
        turns, whole = render_turns(view, bench)
    except (ValueError, DataError) as error:
        yield Found("renders", "error", "the chat template does not render the conversation", str(error))
        return
    for turn in turns:
        broken = list(_check_prefix(view, turn))
        yield from broken
        if not broken:
            yield from _check_answer(view, turn, bench)
        if not whole.startswith(turn.upto):
            yield _rewritten(turn.upto, whole, "is not the beginning of the conversation that goes on")
    if len(view.turns) == 1:
        yield from _check_earlier(view, bench, whole)
    yield from _check_contents(view, turns[-1].prompt if turns else whole, whole)
    yield from _check_tools(view, bench, whole)
    yield from _check_thinking(view, turns)


def _check_prefix(view: View, turn: Turn) -> Iterator[Found]:
    """The prompt of a turn has to be the beginning of the text with the turn."""
    if turn.upto.startswith(turn.prompt):
        return
    parted = _end_of_history(view, turn)
    opening, rest = turn.prompt[parted:], turn.upto[parted:]
    said = visible(view.messages[turn.at])
    header = rest.partition(said)[0] if said and said in rest else rest[: len(opening)]
    if parted < 0:
        yield _rewritten(turn.prompt, turn.upto, "is not the beginning of the text with the answer")
    elif _TAG.search(opening):
        what = f"the prompt at inference begins an answer with {_short(opening)}, and the training text does not"
        yield Found("thinking", "error", what, _beside(opening, rest))
    elif rest.startswith(opening.rstrip()):
        blanks = opening[len(opening.rstrip()) :]
        yield Found(
            "newlines",
            "error",
            f"the prompt at inference ends with {blanks!r}, which the training text has not",
            _beside(opening, rest),
        )
    else:
        yield Found(
            "generation-prompt",
            "error",
            f"an answer begins with {_short(header)} in training and with {_short(opening)} at inference",
            _beside(opening, rest),
        )


def _end_of_history(view: View, turn: Turn) -> int:
    """Where the generation prompt begins, if what stands before it is the same with and without the answer; else -1."""
    history = turn.history
    if history and turn.prompt.startswith(history) and turn.upto.startswith(history):
        return len(history)
    # templates that end a text without a generation prompt in their own way: what comes after the last message
    before = (view.messages[turn.at - 1]["content"] or "").strip() if turn.at else ""
    end = turn.prompt.rfind(before) + len(before) if before and before in turn.prompt else -1
    common = _common(turn.prompt, turn.upto)
    return common if 0 <= end <= common else -1


def _rewritten(shorter: str, longer: str, what: str) -> Found:
    at = _common(shorter, longer)
    message = (
        f"the template rewrites earlier turns: the text before an answer {what}. "
        "Learn the last answer only (data.supervise: last), or use another template"
    )
    return Found("prefix", "error", message, _beside(shorter[max(0, at - 30) :], longer[max(0, at - 30) :]))


def _check_earlier(view: View, bench: Bench, whole: str) -> Iterator[Found]:
    """Where the last answer alone is learned, rewriting earlier turns is allowed, and good to know."""
    assert bench.chat is not None
    for index, message in enumerate(view.messages[:-1]):
        if message["role"] != "assistant":
            continue
        try:
            upto = bench.chat.render(view.messages[: index + 1], view.tools, prompt=False)
        except ValueError:
            continue
        if not whole.startswith(upto):
            yield Found("prefix", "info", "the template rewrites earlier turns, so only the last answer can be learned")
            return


def _check_answer(view: View, turn: Turn, bench: Bench) -> Iterator[Found]:
    """What lies between the prompt and the answer, the answer itself, and what comes after it."""
    body = turn.upto[len(turn.prompt) :]
    said = visible(view.messages[turn.at])
    at = body.find(said)
    if at < 0:
        detail = _beside(said, body)
        yield Found("content", "error", "the answer is not in the training text as it was written", detail)
        return
    if said:
        yield from _check_lead(turn, body[:at], view.messages[turn.at])
    yield from _check_tail(body[at + len(said) :], bench)


def _check_lead(turn: Turn, lead: str, message: Message) -> Iterator[Found]:
    """What stands between the prompt and the answer in training: at inference the model has to write it itself."""
    thought, said = thinking_of(message), message["content"] or ""
    lead = lead.removesuffix(said[: len(said) - len(said.lstrip())])
    if channel := _CHANNEL.search(lead):
        what = "answers are written into channels, whose names the model writes itself"
        yield Found("thinking", "info", what, lead[:80])
        lead = lead[: channel.start()]
    bare = _TAG.sub("", lead.replace(thought, "", 1) if thought else lead)
    before = _TAG.split(lead.partition(thought)[0] if thought else lead)[0]
    ends_with = f"the prompt ends with {turn.prompt[-40:]!r}"
    if bare.strip():
        # some formats let the model write the recipient of an answer; the role of an answer is in every prompt
        whole = turn.prompt == turn.history or re.search("assistant|model|bot", bare, re.IGNORECASE)
        what = f"the prompt at inference lacks {_short(bare)}, which stands before the answer in training"
        yield Found(
            "generation-prompt", "error" if whole else "warning", f"{what}: the model has to write it", ends_with
        )
    elif "\n" in before and not _TAG.search(turn.prompt[-24:]):
        what = f"the prompt at inference lacks {before!r}, which stands before the answer in training"
        yield Found("newlines", "warning", f"{what}: the model has to write it", ends_with)


def _check_tail(tail: str, bench: Bench) -> Iterator[Found]:
    ends: list[int] = []
    for index, text in reversed(bench.encoder.split(tail)):
        if index < 0 and text.strip():
            break
        ends = [index, *ends] if index >= 0 else ends
    if not ends:
        added = [text for text in bench.added() if text and text in tail]
        why = f" ({added[0]} is in the vocabulary, but no special token)" if added else ""
        yield Found(
            "stop-token",
            "error",
            f"an answer ends with {_short(tail) if tail else 'nothing'}, which is no stop token: the model never learns to stop{why}",
        )
    elif not set(ends) & set(bench.model_stops):
        stops = ", ".join(map(bench.name, bench.model_stops)) or "nothing"
        yield Found(
            "model-stop",
            "warning",
            f"an answer ends with {bench.name(ends[0])}, but the model's configuration stops at {stops} only: "
            "other engines generate on (llmkit writes the stop token into generation_config after training)",
        )


def _check_contents(view: View, prompt: str, whole: str) -> Iterator[Found]:
    """Every message is there, whole."""
    for message in view.messages:
        role, said = message["role"], (message["content"] or "").strip()
        if not said or role == "assistant":
            continue
        if _contains(whole, said) and _contains(prompt, said):
            continue
        if role in ("system", "developer"):
            kept = "only a part of" if said[:20] in prompt else "no"
            found = Found("system", "error", f"the chat template leaves {kept} system message in the prompt", said[:80])
        elif role == "tool":
            found = Found("tools", "error", "the result of a tool does not reach the prompt", said[:80])
        else:
            found = Found(
                "content", "error", f"a message of the {role} is not in the prompt as it was written", said[:80]
            )
        yield found


def _contains(text: str, part: str) -> bool:
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text


def _check_tools(view: View, bench: Bench, whole: str) -> Iterator[Found]:
    """Names of tools, and names and arguments of calls, have to be in the text."""
    yield from _check_offered(view, bench)
    for message in view.messages:
        for call in message.get("tool_calls") or []:
            function = call["function"]
            parts = [function["name"], *(str(v) for v in function["arguments"].values() if isinstance(v, str | int))]
            lost = [part for part in parts if not _contains(whole, str(part))]
            if lost:
                yield Found("tools", "error", "the chat template drops calls of tools", ", ".join(map(str, lost)))
                return


def _check_offered(view: View, bench: Bench) -> Iterator[Found]:
    """The tools as the first question is asked, before a call could bring their names into the text."""
    assert bench.chat is not None
    if not view.tools:
        return
    first = next((n for n, message in enumerate(view.messages, 1) if message["role"] == "user"), len(view.messages))
    text, bare = (bench.chat.render(view.messages[:first], tools, prompt=True) for tools in (view.tools, None))
    if text == bare:
        yield Found(
            "tools", "error", "the chat template drops the tools", "the prompt is the same with and without them"
        )
        return
    functions = [tool.get("function", tool) for tool in view.tools]
    wanted = [name for function in functions for name in (str(function.get("name")), *_parameters(function))]
    if lost := [name for name in wanted if not _contains(text, name)]:
        yield Found("tools", "error", "the chat template drops tools or their parameters", ", ".join(lost))


def _parameters(function: dict[str, Any]) -> list[str]:
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return list(map(str, properties)) if isinstance(properties, dict) else []


def _check_thinking(view: View, turns: list[Turn]) -> Iterator[Found]:
    for turn in turns:
        thought = thinking_of(view.messages[turn.at])
        if not thought or thought in turn.upto:
            continue
        if _TAG.search(turn.prompt[-24:]):
            what = "the prompt at inference asks for thinking, and the training text drops it"
            yield Found("thinking", "error", what, thought[:80])
        else:
            what = "the chat template drops the thinking of an answer that is learned"
            yield Found("thinking", "warning", what, thought[:80])


# ---- one case, as tokens ----


def check_tokens(view: View, bench: Bench) -> Iterator[Found]:
    """Training tokens against the prompt, and labels against the turns."""
    if view.prompt is not None:
        yield from check_bos(view.prompt, "prompt", bench)
    if view.ids is None or view.labels is None:
        return
    foreign = view.ids != view.own_ids or view.labels != view.own_labels
    if foreign and view.own_ids is not None and view.own_labels is not None:
        yield from _check_foreign(view, bench)
        return
    if view.prompt is not None and view.ids[: len(view.prompt)] != view.prompt:
        yield Found(
            "generation-prompt",
            "error",
            "the tokens of the prompt at inference are not the beginning of the training tokens",
            difference(view.prompt, view.ids, bench),
        )
    yield from _check_labels(view, bench)


def check_bos(ids: list[int], what: str, bench: Bench) -> Iterator[Found]:
    """One BOS at the beginning of a sequence, none where the tokenizer adds none."""
    bos = bench.tokenizer.bos_token_id
    if bos is None:
        return
    leading = next((n for n, index in enumerate(ids) if index != bos), len(ids))
    name = bench.name(bos)
    pairs = zip(ids[leading:], ids[leading + 1 :], strict=False)
    if leading > 1:
        yield Found("bos", "error", f"the {what} begins with {leading} {name} tokens")
    elif bos != bench.tokenizer.eos_token_id and any(a == b == bos for a, b in pairs):
        yield Found("bos", "error", f"the {what} has {name} twice in a row")
    elif not leading and bos in bench.encoder.around[0]:
        yield Found("bos", "warning", f"the tokenizer puts {name} before a text, and the chat template does not")


def _check_labels(view: View, bench: Bench) -> Iterator[Found]:
    """Each learned stretch is one answer, up to and with a stop token."""
    assert view.ids is not None and view.labels is not None
    learned = segments(view.labels)
    wanted = len(view.turns) if view.text is None else 1
    if len(learned) != wanted:
        yield Found("mask", "error", f"{wanted} answers are to be learned and {len(learned)} stretches of tokens are")
        return
    stops = set(bench.renderer_of(view).stop_ids)
    for number, (start, stop) in enumerate(learned):
        if view.ids[stop - 1] not in stops:
            last = bench.name(view.ids[stop - 1])
            yield Found("stop-token", "error", f"the last token learned of an answer is {last}, which is no stop token")
        said = visible(view.messages[view.turns[number]]) if view.text is None else view.answer or ""
        text = bench.decode(view.ids[start:stop])
        if _letters(said) not in _letters(text):
            yield Found("mask", "error", "what is learned is not the whole answer", _beside(said, text))


def _letters(text: str) -> str:
    """Text without blanks, which decoding may move."""
    return "".join(text.split())


def _check_foreign(view: View, bench: Bench) -> Iterator[Found]:
    """Another pipeline's tokens and labels against llmkit's."""
    ids, labels, own, own_labels = view.ids, view.labels, view.own_ids, view.own_labels
    assert ids is not None and labels is not None and own is not None and own_labels is not None
    bos = bench.tokenizer.bos_token_id
    if bos is not None and ids[: len(own) + 1] == [bos, *own] and own[:1] == [bos]:
        yield Found("bos", "error", f"the training text begins with 2 {bench.name(bos)} tokens")
        ids, labels = ids[1:], labels[1:]
    if len(ids) < len(own) and own[: len(ids)] == ids and any(label != IGNORED for label in own_labels[len(ids) :]):
        lost = sum(label != IGNORED for label in own_labels[len(ids) :])
        yield Found(
            "max-length", "error", "the training pipeline cuts answers off", f"{lost} tokens of answers are lost"
        )
        own_labels = own_labels[: len(ids)]
    elif ids[: len(own)] != own[: len(ids)]:
        yield from _foreign_ids(ids, own, view, bench)
        return
    yield from _compare_masks(
        [label != IGNORED for label in labels], [label != IGNORED for label in own_labels], ids, "mask", bench
    )


def _foreign_ids(ids: list[int], own: list[int], view: View, bench: Bench) -> Iterator[Found]:
    typed = [text for text in bench.added() if any(text in (m["content"] or "") for m in view.messages)]
    where = difference(ids, own, bench)
    if typed:
        message = "the training pipeline takes special tokens that somebody typed for real ones"
        yield Found("literal-specials", "error", message, f"{typed[0]}; {where}")
    else:
        yield Found("generation-prompt", "error", "the training pipeline makes other tokens than the prompt has", where)


def _compare_masks(theirs: list[bool], ours: list[bool], ids: list[int], check: str, bench: Bench) -> Iterator[Found]:
    """Stretch by stretch; blanks and further end tokens after the first stop token may be in either or neither."""
    given = segments([0 if flag else IGNORED for flag in theirs])
    wanted = segments([0 if flag else IGNORED for flag in ours])
    who = "{% generation %} marks" if check == "generation-marks" else "the mask learns"
    if len(given) != len(wanted):
        yield Found(check, "error", f"{who} {len(given)} stretches of tokens where there are {len(wanted)} answers")
        return
    for (start, stop), (first, end) in zip(given, wanted, strict=True):
        different = [
            *_compare_start(start, first, ids, who, check, bench),
            *_compare_end(stop, end, ids, who, check, bench),
        ]
        if different:
            yield from different
            return


def _compare_start(start: int, first: int, ids: list[int], who: str, check: str, bench: Bench) -> Iterator[Found]:
    if start == first:
        return
    # tokens of the prompt that are learned too are always the same ones; what is missing is never learned
    early = start < first
    message = f"{who} answers from {abs(start - first)} token(s) {'before' if early else 'after'} their beginning"
    detail = f"the first token in question is {bench.name(ids[min(start, first)])}"
    yield Found(check, "warning" if early else "error", message, detail)


def _compare_end(stop: int, end: int, ids: list[int], who: str, check: str, bench: Bench) -> Iterator[Found]:
    stops = {*bench.renderer.stop_ids, *bench.model_stops, *bench.encoder.specials.values()}
    if stop < end and ids[stop - 1] not in stops:
        message = f"{who} answers without their stop token, so the model never learns to stop"
        yield Found(check, "error", message, f"the last one is {bench.name(ids[stop - 1])}")
    elif stop > end and bench.decode(ids[end:stop]).strip():
        message = f"{who} {stop - end} token(s) after the end of answers"
        yield Found(check, "error", message, bench.decode(ids[end:stop])[:60])


def check_marks(view: View, bench: Bench) -> Iterator[Found]:
    """``{% generation %}`` of a template, from which other trainers make their mask, against what is learned."""
    text = bench.renderer.chat_template or ""
    if not re.search(r"\{%-?\s*generation\b", text) or view.own_ids is None or view.own_labels is None:
        return
    try:
        made = bench.tokenizer.apply_chat_template(
            view.messages,
            tools=view.tools,
            chat_template=text,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:  # noqa: BLE001  a template's own words, of any type
        yield Found(
            "generation-marks", "warning", "transformers cannot make a mask of {% generation %}", str(error)[:200]
        )
        return
    ids, marks = [int(i) for i in made["input_ids"]], [bool(flag) for flag in made["assistant_masks"]]
    ours = [label != IGNORED for label in view.own_labels]
    if bench.subject.supervise == "last" or len(view.turns) < sum(m["role"] == "assistant" for m in view.messages):
        wanted = len(segments(view.own_labels))
        stretches = segments([0 if flag else IGNORED for flag in marks])[-wanted:]
        marks = [any(a <= n < b for a, b in stretches) for n in range(len(ids))]
    if ids == view.own_ids:
        yield from _compare_masks(marks, ours, ids, "generation-marks", bench)
    else:
        yield from _compare_texts(ids, marks, view, bench)


def _compare_texts(ids: list[int], marks: list[bool], view: View, bench: Bench) -> Iterator[Found]:
    """Marked and learned stretches as text, where the text as a whole has other tokens than its parts."""
    assert view.own_ids is not None and view.own_labels is not None
    marked = [bench.decode(ids[a:b]) for a, b in segments([0 if flag else IGNORED for flag in marks])]
    learned = [bench.decode(view.own_ids[a:b]) for a, b in segments(view.own_labels)]
    theirs, ours = [[_letters(text) for text in texts] for texts in (marked, learned)]
    if theirs == ours:
        return
    detail = _beside("".join(marked), "".join(learned))
    if len(theirs) == len(ours) and all(a.endswith(b) for a, b in zip(theirs, ours, strict=True)):
        yield Found("generation-marks", "warning", "{% generation %} marks a part of the prompt, too", detail)
        return
    message = "{% generation %} marks other text than the answers and their stop tokens"
    yield Found("generation-marks", "error", message, detail)


# ---- one case, as other engines build it ----


def check_paths(view: View, bench: Bench) -> Iterator[Found]:
    """The prompt by transformers' and by vLLM's chat path against ours, token by token."""
    if view.prompt is None or bench.chat is None or view.text is not None:
        return
    before = view.messages[:-1]
    if typed := typed_specials(before, view.tools, bench):
        yield Found(
            "literal-specials",
            "warning",
            "a message holds special tokens as text: transformers and vLLM take them for real ones, llmkit does not",
            f"typed: {', '.join(typed[:4])}",
        )
        return
    why = " Its earlier answers get other tokens than they were learned as" if view.drift else ""
    for check, name, ids in _others(view, bench, before):
        if isinstance(ids, str):
            yield Found(check, "error", f"{name} cannot build the prompt", ids)
        elif ids != view.prompt:
            severity: Severity = "warning" if view.drift else "error"
            yield Found(check, severity, f"{name} builds another prompt.{why}", difference(view.prompt, ids, bench))
    yield from _check_vllm_inputs(view, bench, before)


def typed_specials(messages: list[Message], tools: list[dict[str, Any]] | None, bench: Bench) -> list[str]:
    """Special tokens that stand as text in messages or tools."""
    everything = json.dumps([messages, tools], ensure_ascii=False)
    return [text for text in bench.encoder.specials if json.dumps(text, ensure_ascii=False)[1:-1] in everything]


def _others(view: View, bench: Bench, messages: list[Message]) -> Iterator[tuple[str, str, list[int] | str]]:
    # None lets transformers choose among a tokenizer's several templates, as a server does
    text = bench.renderer.chat_template if bench.subject.chat_template else None
    try:
        made = bench.tokenizer.apply_chat_template(
            messages, tools=view.tools, chat_template=text, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        yield "transformers-path", "apply_chat_template of transformers", [int(i) for i in made["input_ids"]]
        # vLLM renders with transformers and tokenizes the text itself, with add_special_tokens=False for chats
        rendered = bench.tokenizer.apply_chat_template(
            messages, tools=view.tools, chat_template=text, add_generation_prompt=True, tokenize=False
        )
        yield "vllm-path", "vLLM's chat API", bench.plain_ids(str(rendered))
    except Exception as error:  # noqa: BLE001  a template's own words, of any type
        yield "transformers-path", "apply_chat_template of transformers", str(error)[:200]


def _check_vllm_inputs(view: View, bench: Bench, messages: list[Message]) -> Iterator[Found]:
    """What vLLM changes in messages and tools before it renders them must not change the prompt."""
    assert bench.chat is not None
    plain = bench.chat.render(messages, view.tools, prompt=True)
    formed = message_form(messages, bench.chat.text)
    if formed != messages:
        what = "vLLM gives this template messages in another form (contents as lists of parts, system for developer)"
        yield from _same_text(plain, bench, formed, view.tools, what)
    if view.tools:
        what = "vLLM writes tools as type, name, description and parameters, and nothing else"
        yield from _same_text(plain, bench, messages, [tool_form(tool) for tool in view.tools], what)


def _same_text(
    plain: str, bench: Bench, messages: list[Message], tools: list[dict[str, Any]] | None, what: str
) -> Iterator[Found]:
    assert bench.chat is not None
    try:
        other = bench.chat.render(messages, tools, prompt=True)
    except ValueError as error:
        yield Found("vllm-path", "error", f"{what}, which it cannot render", str(error))
        return
    if other != plain:
        at = _common(plain, other)
        detail = _beside(plain[max(0, at - 20) :], other[max(0, at - 20) :])
        yield Found("vllm-path", "warning", f"{what}; so it builds another prompt", detail)


# ---- once a model ----

_TALK: list[Message] = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "ef"},
]


def check_model(bench: Bench) -> Iterator[Found]:
    """What a made-up conversation shows about a tokenizer and its template, whatever the cases are."""
    if bench.chat is None:
        return
    yield from _check_completion_api(bench)
    yield from _check_typed(bench)
    yield from _probe_system(bench)
    if "tools" not in bench.chat.text:
        yield Found("tools", "info", "the chat template has no place for tools")


def _check_completion_api(bench: Bench) -> Iterator[Found]:
    bos = bench.tokenizer.bos_token
    try:
        text = _render(bench, _TALK)
    except (ValueError, DataError):
        return
    if bos and text.startswith(bos) and bench.tokenizer.bos_token_id in bench.encoder.around[0]:
        what = "the rendered text begins with BOS: sent as text to a completion API, which adds one, it would have two"
        yield Found("bos", "info", f"{what}. Send messages, or token ids")


def _render(bench: Bench, messages: list[Message]) -> str:
    assert bench.chat is not None
    return bench.chat.render(bench.chat.with_system(messages), None, prompt=True)


def control_tokens(bench: Bench) -> list[str]:
    """Added tokens by which the template marks turns; tags of thinking and of tools are not among them."""
    text = ""
    for talk in (_TALK, [{"role": "system", "content": "gh"}, *_TALK]):
        try:
            text += _render(bench, talk)
        except (ValueError, DataError):
            continue
    named = [token for token in bench.added() if token and token in text and not _THOUGHT_OR_TOOL.search(token)]
    return sorted(named, key=text.index)


def _check_typed(bench: Bench) -> Iterator[Found]:
    """Control tokens that a user types must not come out as control tokens."""
    added = bench.added()
    for token in control_tokens(bench):
        ids = [_typed(bench, text) for text in ("ab", f"a{token}b")]
        if None in ids:
            return
        plain, typed = [(one or []).count(added[token]) for one in ids]
        if typed > plain:
            why = "" if token in bench.encoder.specials else ": it was added to the vocabulary without being special"
            message = f"{token} typed by a user becomes the control token{why}"
            yield Found("literal-specials", "error", message)


def _typed(bench: Bench, text: str) -> list[int] | None:
    """Tokens of a conversation in which the user says ``text``, by the training pipeline; None when it cannot be had."""
    talk: list[Message] = [{"role": "user", "content": text}]
    try:
        if bench.subject.train is not None:
            ids, _ = bench.subject.train(Conversation([*talk, {"role": "assistant", "content": "cd"}]))
            return [int(index) for index in ids]
        return bench.renderer.prompt(talk)
    except (DataError, ValueError):
        return None


def _probe_system(bench: Bench) -> Iterator[Found]:
    """What becomes of a system message, whether or not the cases have one."""
    question: Message = {"role": "user", "content": "ab"}
    order = {"role": "system", "content": "gh0ij"}
    try:
        bare = _render(bench, [question])
    except (ValueError, DataError):
        return
    try:
        text = _render(bench, [order, question])
    except (ValueError, DataError) as error:
        yield Found("system", "info", "the chat template refuses system messages", str(error))
        return
    between = text.partition(order["content"])[2].partition(question["content"])[0]
    if order["content"] not in text:
        yield Found("system", "info", "the chat template drops system messages")
    elif not any(index >= 0 for index, _ in bench.encoder.split(between)):
        yield Found("system", "info", "the chat template puts the system message into the user's turn")
    own = re.sub(r"[^\w ]+", " ", "".join(t for i, t in bench.encoder.split(bare.split("ab")[0]) if i < 0))
    if bench.subject.system is None and len(own.split()) > 4:
        yield Found(
            "system", "info", "the chat template adds a system message of its own where there is none", own.strip()[:80]
        )


# ---- words ----


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "…")


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _beside(one: str, other: str) -> str:
    """Two texts around the place where they part."""
    at = _common(one, other)
    start = max(0, at - 30)
    return f"…{one[start : at + 30]!r} against …{other[start : at + 30]!r}"


def difference(one: list[int], other: list[int], bench: Bench) -> str:
    """The first token at which two sequences part, in words."""
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    names = [repr(bench.name(side[at])) if at < len(side) else "the end" for side in (one, other)]
    return f"token {at + 1}: {names[0]} against {names[1]}, after {bench.decode(one[max(0, at - 6) : at])!r}"
