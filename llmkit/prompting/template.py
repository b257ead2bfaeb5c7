"""Prompt templates: a file with front matter (YAML) and a body (Jinja), which makes the messages of a case.

The body is Jinja in a sandbox, with every variable declared. Its messages stand in blocks::

    {% system %} … {% endsystem %}
    {% for example in examples %}
    {% user %}{{ example.query }}{% enduser %}
    {% assistant %}{{ example.rewrite }}{% endassistant %}
    {% endfor %}
    {% user %}{{ query }}{% enduser %}

A body without blocks is one user message. What a case holds is never read as Jinja and can never begin a message.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError

from llmkit.data.rows import Message
from llmkit.errors import DataError, Problem, RecipeError
from llmkit.prompting.few_shot import Demonstrations, Embed
from llmkit.prompting.settings import GIVEN, FewShot, TemplateSettings, Variable
from llmkit.recipe_errors import find_problems, remaining, tidy
from llmkit.recipe_hints import close
from llmkit.yaml_positions import MAX_BYTES, read

__all__ = ["FewShot", "PromptTemplate", "TemplateSettings", "Variable", "load_template", "shipped"]

SHIPPED = Path(__file__).parent / "templates"
_FENCE = "---"
_MESSAGES = "llmkit_messages"
_ROLES = ("system", "user", "assistant")


class _MessageBlocks(Extension):
    """``{% user %}…{% enduser %}`` and its like: the text inside becomes a message, not a part of the output."""

    tags = set(_ROLES)  # noqa: RUF012  jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        tag = next(parser.stream)
        role = str(tag.value)
        body = parser.parse_statements((f"name:end{role}",), drop_needle=True)
        arguments = [nodes.Const(role), nodes.Name(_MESSAGES, "load")]
        call = self.call_method("_collect", arguments)
        return nodes.CallBlock(call, [], [], body).set_lineno(tag.lineno)

    @staticmethod
    def _collect(role: str, messages: list[Message], caller: Callable[[], str]) -> str:
        before = len(messages)
        text = caller()
        if len(messages) > before:
            raise jinja2.TemplateRuntimeError(f"a message block stands inside a {role} block")
        messages.append({"role": role, "content": str(text).strip()})
        return ""


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_MessageBlocks],
    )
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """As chat templates have it: letters of every script stay as they are, nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class PromptTemplate:
    """A template that was read and checked. Made by :func:`load_template` or :meth:`parse`."""

    def __init__(self, settings: TemplateSettings, body: str, path: str, first_line: int, digest: str) -> None:
        self.settings = settings
        self.body = body
        self.path = path
        self.digest = digest
        """SHA-256 of the file's text."""
        self._first_line = first_line
        self._environment = _environment()
        # blank lines put before the body make Jinja count lines as the file does
        self._source = "\n" * (first_line - 1) + body
        self._tree = self._environment.parse(self._source, filename=path)
        self._compiled = self._compile(self._source)

        self.name = settings.name
        self.version = str(settings.version)
        self.language = settings.language
        self.kind = settings.kind
        self.variables = list(settings.variables)
        self.few_shot = settings.few_shot
        self.output_schema = settings.output_schema

    def __repr__(self) -> str:
        return f"PromptTemplate({self.name!r}, version {self.version}, {self.path})"

    @property
    def title(self) -> str:
        """``name@version``, for tables."""
        return f"{self.name}@{self.version}"

    @classmethod
    def parse(cls, text: str, path: str = "template") -> PromptTemplate:
        """A template from its text; ``path`` names it in messages. Raises RecipeError with every mistake."""
        front, body, first_line = _split(text, path)
        settings = _front_matter(front, path)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            made = cls(settings, body, path, first_line, digest)
        except jinja2.TemplateSyntaxError as error:
            raise _fail(f"{path}:{error.lineno}", "", f"Jinja: {error.message}", _syntax_hint(error)) from None
        if problems := list(made._mistakes()):
            raise RecipeError(tidy(problems, path), what="prompt template")
        return made

    def _compile(self, source: str) -> jinja2.Template:
        code = self._environment.compile(source, name=self.path, filename=self.path)
        made: jinja2.Template = self._environment.template_class.from_code(
            self._environment, code, self._environment.make_globals(None), None
        )
        return made

    @cached_property
    def used_variables(self) -> frozenset[str]:
        """Names that the body reads from outside, by ``jinja2.meta`` (``examples`` and its like included)."""
        return frozenset(meta.find_undeclared_variables(self._tree) - {_MESSAGES})

    @cached_property
    def unused_variables(self) -> tuple[str, ...]:
        """Declared, and read neither by the body nor by the answer."""
        read_too = self.used_variables | self._answer_variables
        return tuple(variable.name for variable in self.variables if variable.name not in read_too)

    @cached_property
    def _answer_variables(self) -> frozenset[str]:
        if self.settings.answer is None:
            return frozenset()
        return frozenset(meta.find_undeclared_variables(self._environment.parse(self.settings.answer)))

    def _mistakes(self) -> Iterator[Problem]:
        """What is wrong between front matter and body."""
        declared = {variable.name for variable in self.variables}
        for name in sorted(self.used_variables - declared - set(GIVEN)):
            likely = close(name, declared)
            hint = f"did you mean `{likely}`?" if likely else f"declare it: `variables: [{{name: {name}}}]`"
            yield Problem(f"{self.path}:{self._line_of(name)}", name, "is used and not declared", hint)
        if not self.body.strip():
            yield Problem(f"{self.path}:{self._first_line}", "", "the template has no body")
        if self.few_shot and "examples" not in self.used_variables:
            hint = "write `{% for example in examples %} … {% endfor %}`, or remove `few_shot`"
            yield Problem(f"{self.path}:{self._first_line}", "few_shot", "the body never shows `examples`", hint)
        if not self.few_shot and "examples" in self.used_variables:
            yield Problem(f"{self.path}:{self._line_of('examples')}", "examples", "there is no `few_shot` to take from")
        if self.output_schema is None and "output_schema" in self.used_variables:
            where = f"{self.path}:{self._line_of('output_schema')}"
            yield Problem(where, "output_schema", "is used, but the front matter has none")
        yield from self._block_mistakes()

    def _block_mistakes(self) -> Iterator[Problem]:
        blocks = [(block.lineno, _role(block)) for block in self._tree.find_all(nodes.CallBlock) if _role(block)]
        if blocks and self.kind == "text":
            yield Problem(f"{self.path}:{blocks[0][0]}", "kind", "a text has no messages", "write `kind: chat`")
        elif blocks:
            for line, text in self._outside():
                hint = f"put it into {{% user %}} … {{% enduser %}}: {text.strip()[:40]!r}"
                yield Problem(f"{self.path}:{line}", "", "text outside of the message blocks would be lost", hint)

    def _outside(self) -> Iterator[tuple[int, str]]:
        """Literal text and printed values that stand in no message block, with their lines."""
        kept = (nodes.CallBlock, nodes.Macro, nodes.AssignBlock)  # what a macro prints comes out where it is called
        inside = {id(output) for block in self._tree.find_all(kept) for output in block.find_all(nodes.Output)}
        for output in self._tree.find_all(nodes.Output):
            if id(output) in inside:
                continue
            for part in output.nodes:
                if not isinstance(part, nodes.TemplateData):
                    yield part.lineno, "{{ … }}"
                elif part.data.strip():
                    skipped = part.data[: len(part.data) - len(part.data.lstrip())].count("\n")
                    yield part.lineno + skipped, part.data

    def _line_of(self, name: str) -> int:
        lines = [node.lineno for node in self._tree.find_all(nodes.Name) if node.name == name]
        return min(lines, default=self._first_line)

    def demonstrations(self, embed: Embed | None = None) -> Demonstrations | None:
        """What chooses this template's demonstrations; None where it shows none. Raises DataError for bad examples."""
        if self.few_shot is None:
            return None
        names = [variable.name for variable in self.variables]
        return Demonstrations(self.few_shot, folder=Path(self.path).parent, variables=names, embed=embed)

    # ---- a case ----

    def values(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """The declared variables of a case, defaults filled in. Raises DataError with everything that is wrong."""
        made: dict[str, Any] = {}
        wrong: list[str] = []
        for variable in self.variables:
            value = case.get(variable.name)
            if value is None and not variable.required:
                made[variable.name] = variable.default
            elif value is None:
                has = ", ".join(map(str, list(case)[:8])) or "nothing"
                wrong.append(f"`{variable.name}` is missing (the case has: {has})")
            elif why := variable.wrong(value):
                wrong.append(why)
            else:
                made[variable.name] = value
        if wrong:
            raise DataError(f"{self.title}: " + "; ".join(wrong))
        return made

    def render(self, case: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] = ()) -> list[Message] | str:
        """Messages that end with the user's (``kind: chat``), or a text to be continued (``kind: text``).

        ``examples`` are the demonstrations that were chosen for this case (see ``few_shot.Demonstrations``). Raises
        DataError for a case that lacks a variable, has one of a wrong type, or makes the template fail, with its line.
        """
        values = self.values(case)
        messages: list[Message] = []
        given = {"examples": list(examples), "output_schema": self.output_schema, "language": self.language}
        text = self._run(self._compiled, values | given | {_MESSAGES: messages})
        if self.kind == "text":
            return text[len(text) - len(text.lstrip("\n")) :]
        if not messages:
            messages = [{"role": "user", "content": text.strip()}]
        self._check_order(messages)
        return messages

    def answer(self, case: Mapping[str, Any]) -> str | None:
        """The right answer of a case, by ``answer`` of the front matter; None where it says none, and where the case
        lacks (or has null for) what it is made of: not every case has a right answer.
        """
        if self.settings.answer is None:
            return None
        known = dict(case) | self.values(case)
        if any(known.get(name) is None for name in self._answer_variables - {"output_schema"}):
            return None
        return self._run(self._answer_template, known | {"output_schema": self.output_schema})

    @cached_property
    def _answer_template(self) -> jinja2.Template:
        return self._compile(self.settings.answer or "")

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        try:
            return template.render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            line = _line_in(error, self.path)
            where = f"{self.path}:{line}" if line else self.path
            raise DataError(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from None

    def _check_order(self, messages: list[Message]) -> None:
        roles = [message["role"] for message in messages]
        wrong = ""
        if roles[-1] != "user":
            wrong = f"the last message is the {roles[-1]}'s: a prompt ends with the user's"
        elif "system" in roles[1:]:
            wrong = f"message {roles.index('system', 1) + 1} is a system message: it can only be the first"
        elif empty := next((n for n, m in enumerate(messages, 1) if not m["content"]), 0):
            wrong = f"message {empty} ({roles[empty - 1]}) is empty"
        if wrong:
            raise DataError(f"{self.path}: {wrong}")


def load_template(path: str | Path) -> PromptTemplate:
    """Read a template file, or a shipped one by its name, e.g. ``en-query-rewriting``.

    Raises RecipeError with every mistake, each with file and line.
    """
    file = _find(str(path))
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise _fail(str(file), "", f"is larger than {MAX_BYTES // 1024} KiB, too large for a template")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise _fail(str(path), "", f"cannot be read: {error.strerror}", _near(str(path))) from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _fail(f"{file}:{line}", "", f"not UTF-8: byte 0x{raw[error.start]:02x}", "save it as UTF-8") from None
    return PromptTemplate.parse(text.replace("\r\n", "\n"), str(file))


def shipped() -> list[str]:
    """Names of the templates that come with llmkit."""
    return sorted(file.stem for file in SHIPPED.glob("*.jinja"))


def _find(path: str) -> Path:
    own = SHIPPED / f"{path}.jinja"
    return own if "/" not in path and own.is_file() else Path(path).expanduser()


def _near(path: str) -> str:
    likely = close(Path(path).stem, shipped())
    return f"did you mean {likely}?" if likely else f"shipped are: {', '.join(shipped())}"


def _fail(where: str, key: str, message: str, hint: str = "") -> RecipeError:
    return RecipeError([Problem(where, key, message, hint)], what="prompt template")


def _split(text: str, path: str) -> tuple[str, str, int]:
    """Front matter, body, and the number of the body's first line."""
    lines = text.split("\n")
    if lines[0].rstrip() != _FENCE:
        hint = "begin with `---`, then `name:` and what the template needs, then `---` again, then the prompt"
        raise _fail(f"{path}:1", "", "there is no front matter", hint)
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == _FENCE), 0)
    if not end:
        raise _fail(f"{path}:1", "", "the front matter is not closed", "write `---` on a line of its own after it")
    # an empty line instead of the fence keeps YAML's line numbers those of the file
    return "\n".join(["", *lines[1:end]]), "\n".join(lines[end + 1 :]), end + 2


def _front_matter(front: str, path: str) -> TemplateSettings:
    document = read(front, path)
    if not isinstance(document.data, dict):
        raise _fail(f"{path}:2", "", "the front matter is not a mapping of keys to values", "write at least `name:`")
    problems = list(document.problems)
    try:
        settings = TemplateSettings.model_validate(document.data)
    except ValidationError as error:
        problems += find_problems(TemplateSettings, document) or remaining(error, document)
    if problems:
        raise RecipeError(tidy(problems, path), what="prompt template")
    return settings


def _syntax_hint(error: jinja2.TemplateSyntaxError) -> str:
    unknown = re.search(r"unknown tag '(\w+)'", error.message or "")
    if unknown and "endfor" not in str(error.message):
        return "message blocks are {% system %}, {% user %} and {% assistant %}, each closed by {% end… %}"
    return ""


def _role(block: nodes.CallBlock) -> str:
    """The role of a message block; empty for another ``{% call %}``."""
    arguments = block.call.args if isinstance(block.call, nodes.Call) else []
    first = arguments[0] if arguments else None
    return str(first.value) if isinstance(first, nodes.Const) and first.value in _ROLES else ""


def _line_in(error: BaseException, path: str) -> int:
    """The line of the template at which it failed; 0 when it is not known."""
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == path:
            line = step.tb_lineno
        step = step.tb_next
    return line
