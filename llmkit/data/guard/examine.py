"""All checks of ``data.guard`` over the rows of a recipe, once, before any is tokenized.

One pass reads the test sets and makes the index of their n-grams; one reads the training rows, in several processes,
and keeps a few numbers of each; what the checks then find decides which rows are left out or cleaned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.context import Progress
from llmkit.data.guard import checks
from llmkit.data.guard.features import CommonShingles, Features, Task, finder, in_words
from llmkit.data.guard.findings import REPORT, ROWS, Findings
from llmkit.data.guard.kinds import DEFAULT_KINDS
from llmkit.data.guard.leaks import Entries, LeakIndex, Overlaps, entries
from llmkit.data.guard.ledger import Ledger
from llmkit.data.guard.minhash import Bands, MinHasher
from llmkit.data.guard.ngrams import Hashes, Offsets
from llmkit.data.guard.perplexity import HISTOGRAM, cut, histogram, score
from llmkit.data.guard.privacy import PrivacyFilter
from llmkit.data.guard.publish import LENGTHS, draw_lengths
from llmkit.data.guard.settings import GuardSettings
from llmkit.data.guard.view import fingerprint, strings, view
from llmkit.data.guard.workers import Pool, processes
from llmkit.data.pipeline import chunks, new_report, open_source
from llmkit.data.readers import is_uri
from llmkit.data.report import write_json
from llmkit.data.rows import BadRow, RawRow, Sample
from llmkit.data.settings import DataSettings
from llmkit.data.sources import Source, eval_sources, test_sources, train_sources

CHUNK = 1_000
SAMPLE = 20_000
"""Rows from whose shingles the common ones are told."""
_WORTH_PROCESSES = 8_000_000
Mask = NDArray[np.bool_]
FILES = (REPORT, ROWS, HISTOGRAM, LENGTHS)
"""What ``examine`` writes into its output folder."""


class SourceVerdict(NamedTuple):
    """About the rows of one source, in the order of its files, unusable ones included."""

    dropped: Mask
    personal: Mask
    """Rows whose texts have to be cleaned."""
    groups: Offsets | None = None
    """Equal for duplicates, near ones too; -1 for unusable rows."""


@dataclass(frozen=True)
class Verdict:
    """What to do with the rows, and what was found; ``problems`` is what the recipe does not allow."""

    train: list[SourceVerdict]
    eval: list[SourceVerdict]
    report: dict[str, Any]
    problems: list[str]


def examine(
    settings: DataSettings, guard: GuardSettings, work: Path, output: Path, progress: Progress, key: str = "data.train"
) -> Verdict:
    """Check all rows; ``key`` is where the recipe has those of ``settings.train``. ``work`` gets temporary files (about the size of the data), ``output`` the FILES.

    Raises DataError for sources that cannot be read, MissingError for packages, models or keys that are not there.
    """
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    with Findings(output / ROWS) as findings:
        return _Examination(settings, guard, key, work, output, progress, findings).run()


@dataclass
class _Tests:
    """The test side: what training rows are held against, and which held-out rows hold personal data."""

    keys: Hashes
    ids: list[str]
    personal: list[Mask] = field(default_factory=list)
    dropped: list[Mask] = field(default_factory=list)
    index: LeakIndex | None = None


class _Examination:
    def __init__(
        self,
        settings: DataSettings,
        guard: GuardSettings,
        key: str,
        work: Path,
        output: Path,
        progress: Progress,
        findings: Findings,
    ) -> None:
        self._settings, self._guard, self._findings = settings, guard, findings
        self._sources = train_sources(settings, key)
        self._work, self._output, self._progress = work, output, progress
        self._find = finder(guard)
        self._audit = self._find.audit() if self._find else None
        kinds = guard.privacy.kinds if guard.privacy else [kind for kind in DEFAULT_KINDS if kind != "phone"]
        redact = PrivacyFilter(kinds, "redact")
        self._redact: Callable[[str], str] = lambda text: redact.clean(text, 0)
        self._bands: Bands | None = None
        self._overlaps: Overlaps | None = None
        self._personal: list[Mask] = []

    def run(self) -> Verdict:
        guard, findings = self._guard, self._findings
        tests = self._read_tests()
        common = self._common()
        ledger = self._read_train(tests, common)
        report: dict[str, Any] = {"rows": ledger.rows, "test_rows": len(tests.ids)}
        if findings.counts["unusable"]:
            report["unusable"] = findings.summary("unusable", self._settings.on_bad_row)
        if self._audit is not None and guard.privacy is not None:
            report["privacy"] = self._audit.to_json() | findings.summary("privacy", guard.privacy.action)
        if guard.quality is not None:
            report["quality"] = self._quality(ledger)
        if guard.leaks is not None:
            found = self._overlaps.leaks(guard.leaks.share) if self._overlaps else []
            report["leaks"] = checks.leaks(
                ledger, found, tests.keys, tests.ids.__getitem__, guard.leaks.action, findings
            )
        labels: Offsets | None = None
        if guard.duplicates is not None:
            labels, compared = checks.clusters(ledger, self._bands, guard.duplicates, common)
        if guard.contradictions is not None:
            action = guard.contradictions
            report["contradictions"] = checks.contradictions(ledger, labels, action, findings, self._redact)
        if guard.duplicates is not None and labels is not None:
            report["duplicates"] = checks.duplicates(ledger, labels, guard.duplicates.action, findings)
            report["duplicates"] |= {"pairs_compared": compared}
        if guard.quality is not None and guard.quality.perplexity is not None:
            report["quality"]["perplexity"] = self._perplexity(ledger)
        report["dropped"] = {"rows": sum(findings.dropped_by.values()), "by": dict(findings.dropped_by)}
        write_json(self._output / REPORT, report)
        draw_lengths(self._output / LENGTHS, ledger.lengths)
        return self._verdict(ledger, labels, tests, report)

    def _verdict(self, ledger: Ledger, labels: Offsets | None, tests: _Tests, report: dict[str, Any]) -> Verdict:
        dropped = ledger.by_source(self._findings.dropped(ledger.rows))
        cleans = self._guard.privacy is not None and self._guard.privacy.action in ("redact", "pseudonymize")
        personal = ledger.by_source(np.concatenate([np.zeros(0, bool), *self._personal]))
        groups = ledger.labels_by_source(labels) if labels is not None else [None] * len(dropped)
        train = [
            SourceVerdict(out, mask & cleans, group) for out, mask, group in zip(dropped, personal, groups, strict=True)
        ]
        held_out = [SourceVerdict(out, mask & cleans) for out, mask in zip(tests.dropped, tests.personal, strict=True)]
        return Verdict(train, held_out, report, problems(self._findings, report))

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read_tests(self) -> _Tests:
        """Held-out rows and further test sets: fingerprints, n-grams, personal data."""
        tests = _Tests(np.zeros((0, 2), np.uint64), [])
        leaks = self._guard.leaks
        keys: list[tuple[int, int]] = []
        parts: list[Entries] = []
        held_out = eval_sources(self._settings)
        for source in [*held_out, *(test_sources(self._settings) if leaks else [])]:
            personal: list[Mask] = []
            with self._progress.task(f"checking {source.path}", None, "rows") as task:
                for samples, places, read, _ in _samples(source):
                    if leaks is not None:
                        parts.append(_entries(samples, len(tests.ids), leaks.ngram))
                        keys += [_test_keys(sample) for sample in samples]
                        tests.ids += [sample.row_id for sample in samples]
                    if source in held_out:
                        personal.append(self._personal_in(source, samples, places, read))
                    task.advance(read)
            if source in held_out:
                tests.personal.append(np.concatenate([np.zeros(0, bool), *personal]))
                drops = self._guard.privacy is not None and self._guard.privacy.action == "drop"
                tests.dropped.append(tests.personal[-1] & drops)
        tests.keys = np.array(keys, np.uint64).reshape(len(keys), 2)
        if leaks is not None and tests.ids:
            LeakIndex.build(parts, len(tests.ids)).save(self._work)
            tests.index = LeakIndex.open(self._work)
            self._overlaps = Overlaps(tests.index)
        return tests

    def _personal_in(self, source: Source, samples: Sequence[Sample], places: Sequence[int], read: int) -> Mask:
        mask = np.zeros(read, bool)
        if self._find is None or self._audit is None or self._guard.privacy is None:
            return mask
        for sample, place in zip(samples, places, strict=True):
            found = [finding for text in strings(sample) for finding in self._find.find(text)]
            self._audit.add(source.key, found)
            if found:
                mask[place] = True
                self._findings.add("privacy", self._guard.privacy.action, sample.row_id, in_words(found))
        return mask

    def _common(self) -> Hashes:
        """Shingles of the training rows' template, told from the first rows of each source."""
        near = self._guard.duplicates.near if self._guard.duplicates else None
        if near is None:
            return np.zeros(0, np.uint64)
        sources = self._sources
        texts: dict[str, None] = {}
        for source in sources:
            wanted = max(1, SAMPLE // len(sources) // CHUNK)
            for samples, *_ in islice(_samples(source), wanted):
                texts |= dict.fromkeys(view(sample).whole for sample in samples)
        return CommonShingles.of(list(texts), near.ignore_common)

    def _read_train(self, tests: _Tests, common: Hashes) -> Ledger:
        ledger = Ledger(self._work / "rows.bin")
        near = self._guard.duplicates.near if self._guard.duplicates else None
        if near is not None:
            self._bands = Bands(self._work, MinHasher(near.threshold, near.permutations))
        task = Task(self._guard, common, str(self._work) if tests.index is not None else None)
        sources = self._sources
        with Pool(task, processes() if _worth_processes(sources) else 0) as pool:
            for source in sources:
                ledger.begin_source()
                self._read_source(source, pool, ledger)
        ledger.finish()
        return ledger

    def _read_source(self, source: Source, pool: Pool, ledger: Ledger) -> None:
        under_way: list[tuple[list[int], int]] = []

        def feed() -> Iterator[tuple[str, list[Sample]]]:
            for samples, places, read, bad in _samples(source):
                under_way.append((places, read))
                for row in bad:
                    self._findings.add("unusable", self._settings.on_bad_row, row.row_id, row.reason)
                yield source.key, samples

        before = 0
        with self._progress.task(f"checking {source.path}", None, "rows") as task:
            for (_, samples), features in pool.examine(feed()):
                places, read = under_way.pop(0)
                self._note(samples, features, ledger.rows)
                ledger.append(samples, [before + place for place in places], read, features)
                before += read
                task.advance(read)

    def _note(self, samples: Sequence[Sample], features: Features, first: int) -> None:
        """What can be said of a chunk's rows before the others are known."""
        guard, findings = self._guard, self._findings
        if guard.quality is not None:
            for row, check, reason in features.faults:
                findings.add(check, guard.quality.action, samples[row].row_id, reason, first + row)
        personal = np.zeros(len(samples), bool)
        personal[[row for row, _ in features.personal]] = True
        self._personal.append(personal)
        if features.audit is not None and self._audit is not None and guard.privacy is not None:
            self._audit.merge(features.audit)
            for row, kinds in features.personal:
                findings.add("privacy", guard.privacy.action, samples[row].row_id, kinds, first + row)
        if self._bands is not None:
            self._bands.append(features.signatures, features.bands)
        if self._overlaps is not None:
            rows, grams = features.leaks
            self._overlaps.add(rows + first, grams)

    # --- judging ----------------------------------------------------------------------------------------------------

    def _quality(self, ledger: Ledger) -> dict[str, Any]:
        quality, findings = self._guard.quality, self._findings
        assert quality is not None
        report: dict[str, Any] = {"answers": checks.answers(ledger, self._redact)}
        if "length" in quality.checks:
            report["characters"] = checks.lengths(ledger, quality.action, findings)
        if "language" in quality.checks:
            report["languages"] = checks.languages(ledger, quality, findings)
        return report | {"checks": {check: findings.summary(check, quality.action) for check in quality.checks}}

    def _perplexity(self, ledger: Ledger) -> dict[str, Any]:
        """Score the rows that are left, name those above the cut, draw the histogram."""
        quality = self._guard.quality
        assert quality is not None and quality.perplexity is not None
        rows = np.flatnonzero(~self._findings.dropped(ledger.rows))
        texts = (row.whole for row in ledger.get(rows.tolist()))
        scores = score(texts, len(rows), quality.perplexity, self._progress)
        at = cut(scores, quality.perplexity)
        histogram(self._output / HISTOGRAM, scores, at, quality.perplexity.model)
        over = np.flatnonzero(scores > at)
        for number, row in zip(over.tolist(), ledger.get(rows[over].tolist()), strict=True):
            reason = f"perplexity {scores[number]:,.1f} above {at:,.1f}"
            self._findings.add("perplexity", quality.action, row.row_id, reason, int(rows[number]))
        known = scores[~np.isnan(scores)]
        marks = np.percentile(known, [0, 50, 90, 99, 100]).tolist() if len(known) else []
        found = dict(zip(("min", "median", "p90", "p99", "max"), marks, strict=False))
        return self._findings.summary("perplexity", quality.action) | {"cut": at if np.isfinite(at) else None} | found


def _samples(source: Source) -> Iterator[tuple[list[Sample], list[int], int, list[BadRow]]]:
    """Chunks of a source: the usable rows, their places among the chunk's rows, how many those are, the unusable ones."""
    rows, make = open_source(source, new_report(source))
    for chunk in chunks(rows, CHUNK):
        made = [make(row) if isinstance(row, RawRow) else row for row in chunk]
        places = [place for place, sample in enumerate(made) if not isinstance(sample, BadRow)]
        bad = [sample for sample in made if isinstance(sample, BadRow)]
        yield [sample for sample in made if not isinstance(sample, BadRow)], places, len(chunk), bad


def _entries(samples: Sequence[Sample], first: int, ngram: int) -> Entries:
    """Questions and answers of test rows as texts to look for."""
    rows = [view(sample) for sample in samples]
    texts = [row.question for row in rows] + [row.answer for row in rows]
    return entries(texts, np.tile(np.arange(first, first + len(rows)), 2), ngram)


def _test_keys(sample: Sample) -> tuple[int, int]:
    row = view(sample)
    return fingerprint(row.whole), fingerprint(row.question) if row.question else 0


def _worth_processes(sources: Sequence[Source]) -> bool:
    """Whether there is enough to read for other processes to pay for their start."""
    files = [name for source in sources for name in source.files()]
    if any(source.is_hub for source in sources) or any(map(is_uri, files)):
        return True
    return sum(Path(name).stat().st_size for name in files) >= _WORTH_PROCESSES


_FIXES = {
    "privacy": ("data.guard.privacy.action", "redact or pseudonymize replaces it, drop leaves these rows out"),
    "leaks": ("data.guard.leaks.action", "drop leaves these training rows out, report trains on them all the same"),
    "contradictions": ("data.guard.contradictions", "drop leaves all of them out, report keeps them"),
    "exact_duplicates": ("data.guard.duplicates.action", "drop keeps the first of each, report keeps all"),
    "near_duplicates": ("data.guard.duplicates.action", "drop keeps the first of each, report keeps all"),
}
_QUALITY_FIX = ("data.guard.quality.action", "drop leaves these rows out, report keeps them")
_NAMES = {
    "privacy": "rows hold personal data",
    "leaks": "training rows hold rows of the evaluation or test sets",
    "contradictions": "rows have the same question with different answers",
    "exact_duplicates": "rows are there more than once",
    "near_duplicates": "rows are almost equal to others",
    "perplexity": "rows are above the perplexity cut",
}


def problems(findings: Findings, report: dict[str, Any]) -> list[str]:
    """What the recipe does not allow, each a paragraph of the one error message."""
    found = []
    for check, count in findings.refused.items():
        if check == "unusable":  # preparation refuses these, in its own words
            continue
        key, fix = _FIXES.get(check, _QUALITY_FIX)
        what = _NAMES.get(check, f"rows were named by the check `{check}`")
        first = "\n".join(f"    {entry['row']}: {entry['reason']}" for entry in findings.examples[check][:3])
        of = f" of {report['rows']:,}" if check != "privacy" else ""
        found.append(f"{key}: {count:,}{of} {what}. The first:\n{first}\n  Mend them, or set {key}: {fix}.")
    return found
