"""Settings of ``data.guard:``, what is looked for in the rows before they are learned, and what happens then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from llmkit.data.guard.kinds import DEFAULT_KINDS, DEFAULT_REGIONS, Action, Kind
from llmkit.data.source_settings import Sources
from llmkit.recipe import Conflict, Settings

Check = Literal["empty", "boilerplate", "repetition", "encoding", "language", "length"]
RowAction = Literal["report", "drop", "error"]
SET_CHECKS: tuple[Check, ...] = ("length",)
"""Quality checks that compare a row with all the others, which a stream cannot."""


class PrivacySettings(Settings):
    """Personal data in any text of a row, held-out rows included."""

    action: Action = "report"
    """``redact`` puts the kind in the value's place, ``pseudonymize`` a keyed stand-in (the key is in the environment variable LLMKIT_PSEUDONYM_KEY); ``drop`` leaves the row out, ``error`` refuses the data."""
    kinds: list[Kind] = Field(default_factory=lambda: list(DEFAULT_KINDS))
    """What to look for. ``name`` and ``address`` need Presidio, in the extra ``presidio``."""
    regions: list[str] = Field(default_factory=lambda: list(DEFAULT_REGIONS))
    """Regions (ISO 3166) whose phone numbers are known without a country code."""

    def conflicts(self) -> Iterator[Conflict]:
        if not self.kinds:
            yield Conflict("kinds", "names nothing to look for", "set `privacy: null` to look for nothing")


class NearDuplicateSettings(Settings):
    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Least Jaccard similarity of two rows' shingles (6 letters, or 3 characters of Chinese, Japanese and Korean)."""
    permutations: Annotated[int, Field(ge=32, le=1024)] = 128
    """Hash functions of the MinHash signature: more find more of the pairs near the threshold, and take longer."""
    ignore_common: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Shingles that more than this share of the rows have (an instruction that all rows begin with) are not compared."""


class DuplicateSettings(Settings):
    """Rows that the training rows hold more than once; the first of them is kept."""

    action: RowAction = "report"
    """What happens to the second and later ones."""
    near: NearDuplicateSettings | None = NearDuplicateSettings()
    """Rows that are almost the same; null looks for equal ones only (equal but for case and blanks)."""


class LeakSettings(Settings):
    """Training rows that hold what the model is evaluated on."""

    action: RowAction = "error"
    """``drop`` leaves out the training rows that overlap; ``report`` keeps them, and the evaluation means less."""
    against: Sources | None = None
    """Further test sets, which training must not see, beside ``data.eval``."""
    ngram: Annotated[int, Field(ge=4, le=100)] = 13
    """Length of the compared pieces: this many words, or twice as many characters of Chinese, Japanese, Korean and Thai."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of a test question's (or answer's) pieces in one training row from which the row counts as a leak."""


class PerplexitySettings(Settings):
    """Rows that a small model finds unlikely; each row's text is scored once, in preparation."""

    model: Annotated[str, Field(min_length=1)]
    """Folder or hub id of a small causal model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    drop_above_percentile: Annotated[float, Field(gt=0, lt=100)] | None = None
    """Rows above this percentile of perplexity are the ones to act on."""
    max: Annotated[float, Field(gt=1)] | None = None
    """Rows above this perplexity are the ones to act on."""
    max_length: Annotated[int, Field(ge=16)] = 512
    """Tokens of a row that are scored."""

    def conflicts(self) -> Iterator[Conflict]:
        if (self.drop_above_percentile is None) == (self.max is None):
            message = "give one of `drop_above_percentile` and `max`"
            yield Conflict("max", message, "e.g. `drop_above_percentile: 99`", ("drop_above_percentile",))


class QualitySettings(Settings):
    """Rows that are probably no good examples."""

    action: RowAction = "report"
    """What happens to a row that a check names."""
    checks: list[Check] = Field(default_factory=lambda: list(get_args(Check)))
    """``empty``: answers without a letter or digit, or N/A; ``boilerplate``: refusals and "as an AI"; ``repetition``: answers that run in circles; ``encoding``: damaged text (mojibake); ``language``: another language than the data's; ``length``: far shorter or longer than the rest."""
    languages: list[Annotated[str, Field(pattern="^[a-z]{2}$")]] | None = None
    """Languages (ISO 639-1) that the rows may be in; None takes those of at least one row in a hundred."""
    perplexity: PerplexitySettings | None = None
    """Filter by the perplexity under a small model; ``action`` holds for it too."""

    def conflicts(self) -> Iterator[Conflict]:
        if not self.checks and self.perplexity is None:
            yield Conflict("checks", "names no check", "set `quality: null` to check nothing")
        if self.languages is not None and "language" not in self.checks:
            yield Conflict("languages", "does nothing without the check `language`", also=("checks",))
        if self.languages == []:
            yield Conflict("languages", "names no language", "remove the line to take those of the data")


class GuardSettings(Settings):
    """Checks of the training data. Each reports by default and changes no row; only a leak of test data is an error."""

    privacy: PrivacySettings | None = PrivacySettings()
    """Personal data. null looks for none."""
    duplicates: DuplicateSettings | None = DuplicateSettings()
    """Rows that are there more than once. null does not look."""
    leaks: LeakSettings | None = LeakSettings()
    """Overlap with ``data.eval`` and further test sets. null does not look."""
    contradictions: RowAction | None = "report"
    """Rows with the same input and different answers; ``drop`` leaves all of them out. null does not look."""
    quality: QualitySettings | None = QualitySettings()
    """Empty, damaged, boilerplate and outlying rows. null does not look."""
    allow_licenses: list[str] | None = None
    """SPDX ids of the licences that model and data may have; anything else, also an unknown licence, is refused."""

    def conflicts(self) -> Iterator[Conflict]:
        from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

        for index, name in enumerate(self.allow_licenses or []):
            try:
                canonicalize_license_expression(name)
            except InvalidLicenseExpression:
                hint = "see https://spdx.org/licenses; for other licences write LicenseRef-NAME, as in `license:` of a source"
                yield Conflict(f"allow_licenses.{index}", f"{name!r} is no SPDX id", hint)
        if self.allow_licenses == []:
            yield Conflict("allow_licenses", "allows nothing", "remove the line to allow everything")

    def of_held_out(self) -> GuardSettings | None:
        """What holds for held-out rows that are prepared alone: personal data is treated like that of training rows."""
        if self.privacy is None:
            return None
        off = dict.fromkeys(("duplicates", "leaks", "contradictions", "quality", "allow_licenses"))
        return self.model_copy(update=off)

    def stream_conflicts(self) -> Iterator[Conflict]:
        """What needs all rows at once, and so cannot be done while they stream by."""
        for key in ("duplicates", "leaks", "contradictions"):
            if getattr(self, key) is not None:
                yield Conflict(key, "needs all rows, which a stream has not", _STREAM_HINT.format(f"{key}: null"))
        quality = self.quality
        if quality is None:
            return
        if quality.perplexity is not None:
            yield Conflict("quality.perplexity", "needs all rows, which a stream has not", "remove it")
        if any(check in SET_CHECKS for check in quality.checks):
            left = ", ".join(check for check in quality.checks if check not in SET_CHECKS)
            hint = _STREAM_HINT.format(f"checks: [{left}]")
            yield Conflict("quality.checks", "`length` needs all rows, which a stream has not", hint)
        if "language" in quality.checks and quality.languages is None:
            hint = "name them, e.g. `languages: [ko, en]`"
            yield Conflict("quality.languages", "a stream cannot tell which languages are the data's", hint)


_STREAM_HINT = "set `{}`; `llmkit check-data RECIPE data.streaming=false` looks at all rows without training"
