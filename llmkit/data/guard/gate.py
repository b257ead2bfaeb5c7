"""Where rows pass on their way to the tokenizer: what the guard decided about them is done here."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkit.data.guard.examine import SourceVerdict
from llmkit.data.guard.features import finder, in_words
from llmkit.data.guard.language import detect
from llmkit.data.guard.privacy import PrivacyFilter
from llmkit.data.guard.pseudonyms import key_from_environment
from llmkit.data.guard.quality import row_faults
from llmkit.data.guard.settings import GuardSettings
from llmkit.data.guard.view import rewrite, strings, view
from llmkit.data.rows import BadRow, LeftOut, RawRow, Sample
from llmkit.errors import DataError
from llmkit.modeling.locate import find_folder, model_digest

Make = Callable[[RawRow], Sample | BadRow]
Clean = Callable[[Sample], Sample]


def cleaner(guard: GuardSettings) -> Clean | None:
    """Replaces personal data in a row as the recipe says; None where it says nothing of the kind.

    Raises MissingError without the key that pseudonyms need.
    """
    privacy = guard.privacy
    if privacy is None or privacy.action not in ("redact", "pseudonymize"):
        return None
    found = PrivacyFilter(privacy.kinds, privacy.action, regions=privacy.regions)
    return lambda sample: rewrite(sample, lambda text: found.clean(text, sample.row_id))


def guard_identity(guard: GuardSettings) -> list[str]:
    """What decides about the rows beside settings and data: the guard's code, the key of pseudonyms, the scoring model."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.name.encode() + b"\0" + path.read_bytes())
    parts = [code.hexdigest()]
    if guard.privacy is not None and guard.privacy.action == "pseudonymize":
        parts.append(hashlib.blake2b(key_from_environment(), person=b"llmkit cache").hexdigest())
    if guard.quality is not None and (asked := guard.quality.perplexity) is not None:
        parts.append(model_digest(find_folder(asked.model, asked.revision)))
    return parts


class Gate:
    """Lets the rows of one source pass, chunk by chunk in their order, as the verdict says; without one, all of them.

    ``grouped``: the groups of duplicates are given beside the rows.
    """

    def __init__(
        self, verdict: SourceVerdict | None = None, clean: Clean | None = None, *, grouped: bool = False
    ) -> None:
        self._verdict, self._clean, self._grouped = verdict, clean, grouped
        self._read = 0
        self._personal: set[str] = set()

    def pass_on(self, chunk: list[RawRow | BadRow]) -> tuple[list[RawRow | BadRow], list[int] | None]:
        """The rows that stay, and for each the number of its group (None where no groups are known)."""
        verdict = self._verdict
        if verdict is None:
            return chunk, None
        here = slice(self._read, self._read + len(chunk))
        self._read += len(chunk)
        stay = (~verdict.dropped[here]).nonzero()[0].tolist()
        self._personal = {chunk[place].row_id for place in verdict.personal[here].nonzero()[0].tolist()}
        groups = None
        if self._grouped and verdict.groups is not None:
            groups = verdict.groups[here][stay].tolist()
        return [chunk[place] for place in stay], groups

    def around(self, make: Make) -> Make:
        """Converts a row and cleans it, if the verdict says that it holds personal data."""
        clean = self._clean
        if clean is None:
            return make

        def made(row: RawRow) -> Sample | BadRow:
            sample = make(row)
            return sample if isinstance(sample, BadRow) or row.row_id not in self._personal else clean(sample)

        return made


class StreamGuard:
    """The checks that need one row only, on rows that stream by. Counts what it finds in this process."""

    def __init__(self, guard: GuardSettings) -> None:
        self._guard = guard
        self._find = finder(guard)
        self._clean = cleaner(guard)
        self._audit = self._find.audit() if self._find else None
        self._counts: Counter[str] = Counter()

    def around(self, make: Make, source: str) -> Make:
        """Converts a row and checks it. The made function raises DataError for what is an error."""

        def made(row: RawRow) -> Sample | BadRow:
            sample = make(row)
            return sample if isinstance(sample, BadRow) else self._check(sample, source)

        return made

    def _check(self, sample: Sample, source: str) -> Sample | LeftOut:
        quality = self._guard.quality
        for check, reason in self._faults(sample).items():
            self._counts[check] += 1
            if quality is not None and quality.action != "report":
                return self._out(sample, quality.action, "quality", reason)
        return self._private(sample, source)

    def _faults(self, sample: Sample) -> dict[str, str]:
        quality = self._guard.quality
        if quality is None:
            return {}
        row = view(sample)
        faults: dict[str, str] = {str(check): why for check, why in row_faults(row, quality.checks).items()}
        if "language" in quality.checks:
            spoken = {detect(row.question), detect(row.answer)} - {""} - set(quality.languages or ())
            if spoken:
                faults["language"] = f"another language than the data's: {', '.join(sorted(spoken))}"
        return faults

    def _private(self, sample: Sample, source: str) -> Sample | LeftOut:
        privacy = self._guard.privacy
        if privacy is None or self._find is None or self._audit is None:
            return sample
        found = [finding for text in strings(sample) for finding in self._find.find(text)]
        self._audit.add(source, found)
        if not found or privacy.action == "report":
            return sample
        return self._clean(sample) if self._clean else self._out(sample, privacy.action, "privacy", in_words(found))

    def _out(self, sample: Sample, action: str, part: str, reason: str) -> LeftOut:
        if action == "error":
            raise DataError(
                f"{sample.row_id}: {reason} (data.guard.{part}.action: error). Mend the row, or set the action to drop."
            )
        return LeftOut(sample.row_id, reason)

    def to_dict(self) -> dict[str, Any]:
        """Counts for the report."""
        found: dict[str, Any] = {}
        if self._audit is not None and self._guard.privacy is not None:
            found["privacy"] = self._audit.to_json() | {"action": self._guard.privacy.action}
        if self._guard.quality is not None:
            found["quality"] = {"action": self._guard.quality.action, "rows_by_check": dict(self._counts)}
        return found
