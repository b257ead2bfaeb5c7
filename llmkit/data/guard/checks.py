"""Checks of rows against each other: duplicates, contradictions, outliers of length and language, labels, leaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.data.guard.features import CommonShingles
from llmkit.data.guard.findings import Findings
from llmkit.data.guard.language import LANGUAGES
from llmkit.data.guard.ledger import Ledger
from llmkit.data.guard.minhash import Bands, Clusters, Pairs, Similar, join_near
from llmkit.data.guard.ngrams import Hashes, Offsets, jaccard, sets, shingles, unique_pairs
from llmkit.data.guard.quality import REASONS, common_languages, length_limits
from llmkit.data.guard.settings import DuplicateSettings, QualitySettings, RowAction

Mask = NDArray[np.bool_]
Redact = Callable[[str], str]
LABEL = 40
"""Characters up to which an answer is taken for a label: rows with different labels are no duplicates."""
_BLOCK = 2_000
_SHOWN = 20
_SIDES = ("question", "answer")


# --- duplicates -----------------------------------------------------------------------------------------------------


def clusters(ledger: Ledger, bands: Bands | None, settings: DuplicateSettings, common: Hashes) -> tuple[Offsets, int]:
    """For every row the first row of its cluster of duplicates, and how many pairs were compared in full."""
    whole = ledger.keys[:, 0]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    labels = first[inverse].astype(np.int64)
    if bands is None or settings.near is None:
        return labels, 0
    near = Clusters(ledger.rows)
    distinct = np.sort(first).astype(np.int64)
    similar = _similarity(ledger, settings.near.threshold, CommonShingles(common))
    compared = join_near(bands, distinct, settings.near.threshold, similar, near)
    return near.labels()[labels], compared


def _similarity(ledger: Ledger, threshold: float, common: CommonShingles) -> Similar:
    def similar(pairs: Pairs) -> Mask:
        found = np.zeros(len(pairs), bool)
        for start in range(0, len(pairs), _BLOCK):
            part = pairs[start : start + _BLOCK]
            rows = np.unique(part)
            texts = [row.whole for row in ledger.get(rows.tolist())]
            shingled = list(sets(common.without(shingles(texts))))
            near = [jaccard(shingled[a], shingled[b]) >= threshold for a, b in np.searchsorted(rows, part).tolist()]
            found[start : start + _BLOCK] = near & ~_other_label(ledger, part)
        return found

    return similar


def _other_label(ledger: Ledger, pairs: Pairs) -> Mask:
    """Pairs whose answers are short and differ: such rows teach a distinction, however alike their questions are."""
    lengths, answers = ledger.lengths, ledger.keys[:, 2]
    label = (lengths[:, 0] > 0) & (lengths[:, 1] <= LABEL)
    a, b = pairs[:, 0], pairs[:, 1]
    disagree: Mask = label[a] & label[b] & (answers[a] != answers[b])
    return disagree


def duplicates(ledger: Ledger, labels: Offsets, action: RowAction, findings: Findings) -> dict[str, Any]:
    """Name every row of a cluster but the first that no other check drops."""
    alive = np.flatnonzero(~findings.dropped(ledger.rows))
    _, first, inverse = np.unique(labels[alive], return_index=True, return_inverse=True)
    kept = alive[first][inverse]
    again = np.flatnonzero(kept != alive)
    rows, originals = alive[again], kept[again]
    exact = ledger.keys[rows, 0] == ledger.keys[originals, 0]
    named = zip(ledger.get(rows.tolist()), ledger.get(originals.tolist()), rows.tolist(), exact.tolist(), strict=True)
    for row, original, number, same in named:
        check, reason = ("exact_duplicates", "equal to") if same else ("near_duplicates", "almost equal to")
        findings.add(check, action, row.row_id, f"{reason} {original.row_id}", number, of=original.row_id)
    sizes = np.bincount(inverse)
    largest = np.argsort(-sizes, kind="stable")[:10]
    return {
        "exact": findings.summary("exact_duplicates", action),
        "near": findings.summary("near_duplicates", action),
        "largest_groups": [
            {"rows": int(sizes[n]), "first": ledger[int(alive[first[n]])].row_id} for n in largest if sizes[n] > 1
        ],
    }


# --- contradictions -------------------------------------------------------------------------------------------------


def contradictions(
    ledger: Ledger, labels: Offsets | None, action: RowAction, findings: Findings, redact: Redact
) -> dict[str, Any]:
    """Name the rows whose question other rows answer differently: by more than case and blanks, and where the clusters
    of duplicates are known (``labels``), by more than near duplicates differ."""
    asked = np.flatnonzero((ledger.lengths[:, 0] > 0) & ~findings.dropped(ledger.rows))
    question = ledger.keys[asked, 1]
    answer = ledger.keys[asked, 2] if labels is None else labels[asked]
    questions, answers = np.unique(unique_pairs(question, answer)[0], return_counts=True)
    disputed = questions[answers > 1]
    rows = asked[np.isin(question, disputed)]
    order = np.lexsort((rows, ledger.keys[rows, 1]))
    groups = np.split(rows[order], np.flatnonzero(np.diff(ledger.keys[rows[order], 1])) + 1) if len(rows) else []
    shown: list[dict[str, Any]] = []
    for group in sorted(groups, key=lambda members: int(members[0])):
        kept = list(ledger.get(group.tolist()))
        for number, row in zip(group.tolist(), kept, strict=True):
            reason = f"the question of {kept[0].row_id} with another answer" if number != group[0] else "answered twice"
            findings.add("contradictions", action, row.row_id, reason, number, group=kept[0].row_id)
        if len(shown) < _SHOWN:
            pairs = [{"row": row.row_id, "answer": _short(redact(row.answer), 80)} for row in kept[:5]]
            shown.append({"question": _short(redact(kept[0].question), 160), "rows": len(kept), "answers": pairs})
    return findings.summary("contradictions", action) | {"questions": len(groups), "groups": shown}


def _short(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


# --- outliers -------------------------------------------------------------------------------------------------------


def lengths(ledger: Ledger, action: RowAction, findings: Findings) -> dict[str, Any]:
    """Name the rows whose question or answer is far shorter or longer than the rest."""
    found: dict[str, Any] = {}
    for side, name in enumerate(_SIDES):
        sizes = ledger.lengths[:, side].astype(np.int64)
        low, high = length_limits(sizes)
        out = np.flatnonzero((sizes > 0) & ((sizes < low) | (sizes > high)))
        for number, row in zip(out.tolist(), ledger.get(out.tolist()), strict=True):
            reason = f"{REASONS['length']}: the {name} has {sizes[number]:,} characters"
            findings.add("length", action, row.row_id, reason, number)
        known = sizes[sizes > 0]
        if len(known):
            marks = np.percentile(known, [0, 5, 50, 95, 100]).tolist()
            found[name] = dict(zip(("min", "p5", "median", "p95", "max"), marks, strict=True))
            found[name] |= {"low": low, "high": high} if np.isfinite(high) else {}
    return found


def languages(ledger: Ledger, settings: QualitySettings, findings: Findings) -> dict[str, Any]:
    """Name the rows in a language that is not the data's; the distribution of languages."""
    shares: dict[str, Any] = {}
    for side, name in enumerate(_SIDES):
        codes = ledger.languages[:, side]
        wanted = set(settings.languages or ())
        allowed = {n for n, known in enumerate(LANGUAGES, 1) if known in wanted} if wanted else common_languages(codes)
        out = np.flatnonzero((codes != 0) & ~np.isin(codes, list(allowed)))
        for number, row in zip(out.tolist(), ledger.get(out.tolist()), strict=True):
            reason = f"{REASONS['language']}: the {name} is in {LANGUAGES[codes[number] - 1]}"
            findings.add("language", settings.action, row.row_id, reason, number)
        values, counts = np.unique(codes, return_counts=True)
        shares[name] = {
            (LANGUAGES[value - 1] if value else "unclear"): count
            for count, value in sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)
        }
    return shares


def answers(ledger: Ledger, redact: Redact) -> dict[str, Any]:
    """How often answers repeat: the distribution of labels where answers are few and short, else the commonest ones."""
    asked = np.flatnonzero(ledger.lengths[:, 0] > 0)
    if not len(asked):
        return {}
    values, first, counts = np.unique(ledger.keys[asked, 2], return_index=True, return_counts=True)
    short = float(np.mean(ledger.lengths[asked, 1] <= LABEL))
    labels = short >= 0.9 and len(values) <= max(2, min(1_000, len(asked) // 5))
    order = np.argsort(-counts, kind="stable")
    shown = [n for n in order[: 50 if labels else 10].tolist() if labels or counts[n] > 1]
    texts = [_short(redact(row.answer), 80) for row in ledger.get(asked[first[shown]].tolist())]
    common = [
        {"answer": text, "rows": int(counts[n]), "share": float(counts[n] / len(asked))}
        for n, text in zip(shown, texts, strict=True)
    ]
    return {
        "kind": "labels" if labels else "texts",
        "different": len(values),
        "commonest": common,
        **({"rare": int(np.sum(counts < 5)), "largest_share": float(counts.max() / len(asked))} if labels else {}),
    }


# --- leaks ----------------------------------------------------------------------------------------------------------


def leaks(
    ledger: Ledger,
    found: Sequence[tuple[int, int, float]],
    test_keys: Hashes,
    test_ids: Callable[[int], str],
    action: RowAction,
    findings: Findings,
) -> dict[str, Any]:
    """Name the training rows that hold a test row: its question as a whole, or much of its text.

    ``test_keys`` is (test rows, 2): fingerprints of the whole row and of its question, 0 for no question.
    """
    same = _same(ledger, test_keys)
    leaked: dict[int, tuple[int, str]] = {
        row: (test, f"{share:.0%} of the text of") for row, test, share in reversed(found)
    }
    leaked |= same
    tests = set()
    for number, row in zip(sorted(leaked), ledger.get(sorted(leaked)), strict=True):
        test, how = leaked[number]
        tests.add(test)
        of = test_ids(test)
        findings.add("leaks", action, row.row_id, f"holds {how} {of}", number, of=of)
    return findings.summary("leaks", action) | {"test_rows_compared": len(test_keys), "test_rows_leaked": len(tests)}


def _same(ledger: Ledger, test_keys: Hashes) -> dict[int, tuple[int, str]]:
    """Training rows with the same question as a test row (documents: the same text), and the first such test row."""
    found: dict[int, tuple[int, str]] = {}
    documents = ledger.lengths[:, 0] == 0
    for column, own, side, how in (
        (0, documents, test_keys[:, 0], "the same text as"),
        (1, ~documents, test_keys[:, 1], "the same question as"),
    ):
        values, first = np.unique(side, return_index=True)
        keys = ledger.keys[:, column]
        place = np.minimum(np.searchsorted(values, keys), max(0, len(values) - 1))
        if len(values):
            rows = np.flatnonzero(own & (values[place] == keys) & (keys != 0))
            found |= {int(row): (int(first[place[row]]), how) for row in rows}
    return found
