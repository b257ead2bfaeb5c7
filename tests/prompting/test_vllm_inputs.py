"""What vLLM makes of messages and tools before it renders them (held against the code of vLLM 0.32 when written)."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.prompting.report import Case, Subject
from llmkit.prompting.static import check_static, open_subject
from llmkit.prompting.vllm_inputs import loops_over_content, message_form, tool_form

EACH = "{% for m in messages %}"
END = "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "loops"),
    [
        (EACH + "{{ m.content }}" + END, False),
        (EACH + "{% for part in m.content %}{{ part.text }}{% endfor %}" + END, True),
        (EACH + "{% for part in m['content'][1:] | list %}{{ part }}{% endfor %}" + END, True),
        ("{% set rest = messages[1:] %}{% for m in rest %}{% for p in m.content %}{{ p }}{% endfor %}{% endfor %}", True),
        (EACH + "{% set content = m.content %}{% for p in content %}{{ p }}{% endfor %}" + END, True),
        (EACH + "{% set words = m.content %}{% for p in words %}{{ p }}{% endfor %}" + END, False),
        ("{% macro show(x) %}{% for p in x %}{{ p }}{% endfor %}{% endmacro %}" + EACH + "{{ show(m.content) }}" + END, True),
        ("{% macro show(x) %}{% for p in x %}{{ p }}{% endfor %}{% endmacro %}" + EACH + "{{ show(x=m.content) }}" + END, True),
        ("{% macro show(content) %}{% for p in content %}{{ p }}{% endfor %}{% endmacro %}" + EACH + "{{ m.role }}" + END, False),
        (EACH + "{% for tool in tools %}{{ tool }}{% endfor %}" + END, False),
        ("{% for", False),
    ],
)  # fmt: skip
def test_the_form_of_contents_follows_the_template(template: str, loops: bool) -> None:
    assert loops_over_content(template) is loops


def test_developer_becomes_system_where_the_template_does_not_know_it() -> None:
    talk = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}, {"role": "system", "content": "c"}]
    assert message_form(talk, "{{ messages }}") == [{"role": "system", "content": "a\n\nc"}, talk[1]]
    assert message_form(talk, "{% if m.role == 'developer' %}") == talk


def test_tools_are_written_anew() -> None:
    tool = {"function": {"parameters": {"x": 1}, "name": "f", "note": "?", "strict": True}}
    assert list(tool_form(tool)["function"].items()) == [
        ("name", "f"), ("description", None), ("parameters", {"x": 1}), ("strict", True),
    ]  # fmt: skip


def test_a_prompt_that_vllm_would_build_otherwise_is_a_warning(tiny_llama: Path) -> None:
    base = open_subject(str(tiny_llama))
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + str(base.tokenizer.chat_template)  # type: ignore[arg-type]
    subject = Subject("tiny", base.tokenizer, chat_template=template, stop_ids=base.stop_ids)
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    talk = [{"role": "user", "content": "a"}]

    def found(function: dict[str, object]) -> list[str]:
        tools = [{"type": "function", "function": function}]
        return [issue.check for issue in check_static(None, subject, [Case("1", messages=talk, tools=tools)]).warnings]

    assert found(function) == []
    assert found(dict(reversed(function.items()))) == ["vllm-path"]
    assert found(function | {"note": "x"}) == ["vllm-path"]
