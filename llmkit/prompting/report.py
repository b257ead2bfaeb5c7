"""What is tested, and what was found: cases, the model under test, issues, token counts, cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmkit.data.rows import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Severity = Literal["error", "warning", "info"]


class Check(NamedTuple):
    id: str
    title: str


CHECKS: tuple[Check, ...] = (
    Check("renders", "the template renders every case"),
    Check("variables", "variables are declared, given and used"),
    Check("content", "every message is in the prompt, whole"),
    Check("bos", "the text begins with one BOS, where the tokenizer wants one"),
    Check("stop-token", "every assistant turn ends with a stop token, and it is learned"),
    Check("model-stop", "the model's own configuration stops at the token that ends a turn"),
    Check("generation-prompt", "the prompt at inference is, token for token, the beginning of the training text"),
    Check("prefix", "a later turn does not rewrite earlier ones"),
    Check("newlines", "no newline is missing between the prompt and the answer"),
    Check("mask", "what is learned is the answers and their stop tokens, no token more or less"),
    Check("generation-marks", "{% generation %} marks what is learned, no token more or less"),
    Check("system", "system messages reach the model"),
    Check("tools", "tools, calls and their results reach the model"),
    Check("thinking", "thinking is asked for at inference only where it is learned"),
    Check("literal-specials", "special tokens that somebody typed stay text"),
    Check("transformers-path", "transformers' apply_chat_template builds our prompt"),
    Check("vllm-path", "vLLM's chat API builds our prompt"),
    Check("max-length", "no answer is cut by the length limit"),
    Check("output-schema", "the right answers follow the template's output_schema"),
)
"""The static checks, by id."""


@dataclass(frozen=True)
class Case:
    """One case. ``values`` are the columns of its row, from which a template makes the prompt.

    A case without a template brings ``messages``, up to the last user's or with the assistant's answer at the end.
    ``answer`` is the right answer where it is known.
    """

    id: str
    values: Mapping[str, Any] = field(default_factory=dict)
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    answer: str | None = None


Train = Callable[[Conversation], tuple[Sequence[int], Sequence[int]]]
"""A training pipeline: a conversation to token ids [n] and labels [n], -100 where nothing is learned."""


@dataclass(frozen=True)
class Subject:
    """A model under test, without its weights.

    ``chat_template`` is as in ``data.chat_template``: text, a file, a shipped name, or None for the tokenizer's own.
    ``stop_ids`` are the tokens at which the model's ``generation_config`` stops; None takes the tokenizer's eos.
    ``train`` is the training pipeline that is held against the prompt; None takes llmkit's own.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    system: str | None = None
    supervise: Literal["all", "last"] = "all"
    seq2seq: bool = False
    stop_ids: tuple[int, ...] | None = None
    train: Train | None = None


@dataclass(frozen=True)
class Issue:
    """Something that a check found. ``case`` is the first case it was found in, None where it is none's.

    ``cases`` counts the cases. An ``error`` makes a model that is asked otherwise than it was taught; a ``warning``
    may; ``info`` is what this template does, good to know.
    """

    check: str
    severity: Severity
    message: str
    template: str = ""
    model: str = ""
    case: str | None = None
    detail: str = ""
    cases: int = 0


@dataclass(frozen=True)
class Prices:
    """Per million tokens, in any currency; 0 leaves cost out."""

    input: float = 0.0
    output: float = 0.0


@dataclass(frozen=True)
class CaseTokens:
    """Tokens of one case. ``answer`` counts the last answer with its stop token; it is 0 where no answer is known.

    ``total`` is the whole row as it is learned (the prompt alone where no answer is known), ``cut`` what
    ``max_length`` would take away of it.
    """

    case: str
    prompt: int
    answer: int = 0
    total: int = 0
    cut: int = 0


@dataclass
class StaticReport:
    """What the static checks of one template with one model found. ``cost`` is that of all cases, None without prices."""

    template: str
    model: str
    issues: list[Issue] = field(default_factory=list)
    tokens: list[CaseTokens] = field(default_factory=list)
    cost: float | None = None
    skipped: list[str] = field(default_factory=list)
    """Ids of checks that do not apply, e.g. those of chat templates to a plain text."""

    def of(self, severity: Severity) -> list[Issue]:
        return [issue for issue in self.issues if issue.severity == severity]

    @property
    def errors(self) -> list[Issue]:
        return self.of("error")

    @property
    def warnings(self) -> list[Issue]:
        return self.of("warning")

    @property
    def passed(self) -> bool:
        return not self.errors

    def status(self) -> Iterator[tuple[Check, Severity | Literal["ok", "skipped"]]]:
        """Every check with the worst that it found."""
        order: tuple[Severity, ...] = ("error", "warning", "info")
        for check in CHECKS:
            found = {issue.severity for issue in self.issues if issue.check == check.id}
            worst = next((severity for severity in order if severity in found), None)
            yield check, worst or ("skipped" if check.id in self.skipped else "ok")

    def summary(self) -> dict[str, Any]:
        """Counts and token statistics, flat, for a tracker."""
        prompts = sorted(one.prompt for one in self.tokens)
        totals = [one.total for one in self.tokens]
        made: dict[str, Any] = {"errors": len(self.errors), "warnings": len(self.warnings), "cases": len(prompts)}
        if prompts:
            made |= {
                "prompt_tokens_mean": sum(prompts) / len(prompts),
                "prompt_tokens_max": prompts[-1],
                "tokens_max": max(totals),
                "cases_cut": sum(one.cut > 0 for one in self.tokens),
            }
        return made if self.cost is None else made | {"cost": self.cost}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "template": self.template,
            "model": self.model,
            "summary": self.summary(),
            "issues": [asdict(issue) for issue in self.issues],
            "tokens": [asdict(one) for one in self.tokens],
            "skipped": self.skipped,
        }
