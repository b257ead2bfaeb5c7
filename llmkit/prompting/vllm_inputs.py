"""What vLLM's chat API makes of messages and tools before it renders them, as read in vLLM 0.32.

It renders with the tokenizer's own chat template, then tokenizes with ``add_special_tokens=False``. Before that
(vllm/renderers/hf.py, vllm/entrypoints/openai/chat_completion/protocol.py):

- tools pass through its request types: ``type`` and ``function`` with ``name``, ``description`` and ``parameters`` in
  this order, None where one is missing, anything unknown dropped;
- contents become lists of parts where the template loops over the content of a message, those of tools excepted;
- ``developer`` becomes ``system`` where the template never says ``developer``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jinja2
from jinja2 import nodes

from llmkit.data.rows import Message

_OPTIONAL = ("strict", "defer_loading")


def tool_form(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as vLLM's request types write it out."""
    function = tool.get("function", tool)
    form = {key: function.get(key) for key in ("name", "description", "parameters")}
    form |= {key: function[key] for key in _OPTIONAL if function.get(key) is not None}
    made: dict[str, Any] = {"type": "function", "function": form}
    if tool.get("defer_loading") is not None:
        made["defer_loading"] = tool["defer_loading"]
    return made


def message_form(messages: list[Message], template: str) -> list[Message]:
    """Messages as vLLM gives them to a chat template."""
    messages = [dict(message) for message in messages]
    knows = "'developer'" in template or '"developer"' in template
    if not knows and any(message["role"] == "developer" for message in messages):
        messages = _one_system([m | {"role": "system"} if m["role"] == "developer" else m for m in messages])
    if loops_over_content(template):
        for message in (message for message in messages if message["role"] != "tool"):
            message["content"] = [{"type": "text", "text": message["content"]}] if message["content"] else []
    return messages


def _one_system(messages: list[Message]) -> list[Message]:
    """System messages that are not one at the beginning are joined there."""
    system = [message["content"] for message in messages if message["role"] == "system" and message["content"]]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *others]


def loops_over_content(template: str) -> bool:
    """Whether a template goes through the content of a message part by part."""
    try:
        tree = _parse(template)
    except jinja2.TemplateError:
        return False
    messages = {loop.target.name for loop in _loops(tree) if _reads(loop.iter, _aliases(tree, "messages"), None)}
    inside = {id(loop): macro for macro in tree.find_all(nodes.Macro) for loop in _loops(macro)}
    for loop in _loops(tree):
        macro = inside.get(id(loop))
        if _reads(loop.iter, messages, "content"):
            return True
        if not isinstance(loop.iter, nodes.Name):
            continue
        if macro is None and loop.iter.name == "content":
            return True
        if macro is not None and loop.iter.name in set(_content_parameters(tree, macro, messages)):
            return True
    return False


def _parse(template: str) -> nodes.Template:
    from transformers.utils import chat_template_utils

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    environment = compile_template(template).environment if compile_template else jinja2.Environment()
    tree: nodes.Template = environment.parse(template)
    return tree


def _loops(tree: nodes.Node) -> Iterator[Any]:
    """``for`` loops over one name each."""
    return (loop for loop in tree.find_all(nodes.For) if isinstance(loop.target, nodes.Name))


def _aliases(tree: nodes.Node, name: str) -> set[str]:
    """Names that are set to a variable, or to a part of it, from one to the next."""
    known = {name}
    assigned = [a for a in tree.find_all(nodes.Assign) if isinstance(a.target, nodes.Name)]
    while fresh := {a.target.name for a in assigned if _reads(a.node, known, None)} - known:  # type: ignore[attr-defined]
        known |= fresh
    return known


def _reads(node: Any, names: set[str], key: str | None) -> bool:
    """Whether an expression is one of the variables (or its ``key``), perhaps filtered or sliced."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return node.node is not None and _reads(node.node, names, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _reads(node.node, names, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.name in names
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == key and _reads(node.node, names, None)
    return isinstance(node, nodes.Getattr) and node.attr == key and _reads(node.node, names, None)


def _content_parameters(tree: nodes.Node, macro: Any, messages: set[str]) -> Iterator[str]:
    """Parameters of a macro that are given a message's content somewhere."""
    for call in tree.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        for parameter, argument in zip(macro.args, call.args, strict=False):
            if _reads(argument, messages, "content"):
                yield parameter.name
        yield from (keyword.key for keyword in call.kwargs if _reads(keyword.value, messages, "content"))
