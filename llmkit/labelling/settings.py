"""Settings of ``llmkit label``: the labels, how they are scored, several votes, abstaining, gold labels, the cost cap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from llmkit.recipe import Conflict, Settings

Text = Annotated[str, Field(min_length=1)]
Part = Annotated[float, Field(ge=0, le=1)]


class LabelSettings(Settings):
    text: Text | None = None
    """What the model writes for this label; None takes its name."""
    description: str = ""
    """What it means; templates read it from ``label_descriptions``."""


Labels = Text | list[Text] | dict[Text, Text | LabelSettings]


class ScoringSettings(Settings):
    """How the log-probabilities of label strings become probabilities of labels."""

    normalize: Literal["sum", "mean"] = "sum"
    """``sum``: the probability of the whole label; ``mean``: per token, so that long labels are not less likely."""
    calibration: Literal["none", "contextual", "batch"] = "none"
    """Take a bias for some labels away: ``contextual`` asks with inputs that say nothing, ``batch`` averages over the first rows."""
    content_free: list[str] = Field(default_factory=lambda: ["N/A", "", "[MASK]"])
    """What ``contextual`` puts in the place of every text; the mean over them is the bias."""
    calibration_rows: Annotated[int, Field(ge=2)] = 200
    """Rows from the input's beginning that ``batch`` averages over."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Scores are divided by it: above 1 makes probabilities less sure. It does not change which label is the likeliest."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.calibration == "contextual" and not self.content_free:
            yield Conflict("content_free", "is empty, so that there is nothing to ask with", also=("calibration",))


class CombineSettings(Settings):
    """One label from several voters: each model with each template is one."""

    rule: Literal["majority", "weighted", "mean", "dawid-skene"] = "majority"
    """``majority``: most votes; ``weighted``: by ``weights``; ``mean``: of the probabilities; ``dawid-skene``: a label model."""
    weights: dict[Text, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weight of a voter by its name, ``model`` or ``model/template``; for ``weighted`` and ``mean``, 1 where none is given."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.weights and self.rule not in ("weighted", "mean"):
            yield Conflict("weights", f"are not used with `rule: {self.rule}`", "write `rule: weighted`", ("rule",))
        if self.rule == "weighted" and not self.weights:
            yield Conflict("weights", "are missing: without them it is `rule: majority`", also=("rule",))


class AbstainSettings(Settings):
    """When a row gets no label. Such rows are in ``abstained/``, each with its reason, and not in ``labels/``."""

    below: Part = 0.0
    """Least probability of the label."""
    agreement: Part = 0.0
    """Least share of the votes (voters times samples) that are for the label."""
    tie: bool = True
    """Abstain where two labels are equally likely; False takes the one that stands first in ``labels``."""


class GoldSettings(Settings):
    """Right answers of some rows or all, to measure agreement with."""

    column: Text
    """Column that holds the right label, in the input or in ``path``; an empty value is none."""
    path: Text | None = None
    """File of right labels; None takes them from the input."""
    key: Text | None = None
    """Column by which a row of ``path`` and one of the input are the same; needed with ``path``."""

    def conflicts(self) -> Iterator[Conflict]:
        if (self.path is None) != (self.key is None):
            have, lack = ("key", "path") if self.path is None else ("path", "key")
            yield Conflict(lack, f"is missing: `{have}` needs it", also=(have,))


class BudgetSettings(Settings):
    """When to stop. A run that stopped goes on where it was, with the same command and a higher cap."""

    tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens that go through the models."""
    money: Annotated[float, Field(gt=0)] | None = None
    """Most that the time may cost, at ``price_per_hour``."""
    price_per_hour: Annotated[float, Field(gt=0)] | None = None
    """Price of an hour of this machine; None takes the device's from llmkit's table."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.price_per_hour is not None and self.money is None:
            yield Conflict("price_per_hour", "is not used without `money`", also=("money",))
