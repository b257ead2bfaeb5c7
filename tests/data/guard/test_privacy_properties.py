"""What holds for any text: places are right, cleaning is final, nothing of a value is left in an audit."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.guard.audit import Audit
from llmkit.data.guard.kinds import KEY_VARIABLE
from llmkit.data.guard.privacy import PrivacyFilter

KEY = b"a key for tests, 32 bytes long.."
REDACT, PSEUDONYMIZE = PrivacyFilter(action="redact"), PrivacyFilter(action="pseudonymize", key=KEY)
VALUES = {
    "010-2345-6789": "phone", "kim.minsu@corp.co.kr": "email", "4111 1111 1111 1111": "card", "DE89 3704 0044 0532 0130 00": "iban", "850101-1234566": "kr_rrn",
    "11010519491231002X": "cn_id", "A123456789": "tw_id", "536-22-1234": "us_ssn", "52.14.8.201": "ip", "hf_" + "aB3d" * 9: "secret",
}  # fmt: skip
words = st.text(st.characters(codec="utf-8", exclude_categories=["Nd", "Cf"]), max_size=12).filter(
    lambda text: not any(char.isascii() and (char.isalnum() or char in "_.,-/+@:=~()") for char in text)
)
rows = st.lists(st.one_of(words, st.sampled_from(list(VALUES))), max_size=8).map("\n".join)
noise = st.text(st.sampled_from("0123456789-. ()+@:/=ABab가中ー＠０１\u200b\n"), max_size=80)


@settings(max_examples=150, deadline=None)
@given(st.one_of(rows, noise, st.text(max_size=80)))
def test_findings_are_ordered_apart_and_inside_the_text(text: str) -> None:
    end = 0
    for finding in REDACT.find(text):
        assert end <= finding.start < finding.end <= len(text)
        end = finding.end


@settings(max_examples=150, deadline=None)
@given(rows)
def test_every_planted_value_is_found_and_gone_afterwards(text: str) -> None:
    planted = [value for value in text.split("\n") if value in VALUES]
    assert sorted(f.kind for f in REDACT.find(text)) == sorted(VALUES[value] for value in planted)
    for guard in (REDACT, PSEUDONYMIZE):
        cleaned = guard.clean(text, 1)
        assert not any(value in cleaned for value in planted)
        assert guard.find(cleaned) == []


@settings(max_examples=150, deadline=None)
@given(noise)
def test_text_outside_of_findings_is_never_changed(text: str) -> None:
    cleaned, findings = REDACT.apply(text, 1)
    parts, done = [], 0
    for finding in findings:
        parts += [text[done : finding.start], f"<{finding.kind.upper()}>"]
        done = finding.end
    assert cleaned == "".join(parts) + text[done:]


@settings(max_examples=100, deadline=None)
@given(st.lists(rows, max_size=6))
def test_an_audit_never_contains_a_value(texts: list[str]) -> None:
    audit = PSEUDONYMIZE.audit()
    for text in texts:
        audit.add("train.jsonl", PSEUDONYMIZE.find(text))
    written = json.dumps(audit.to_json(), ensure_ascii=False) + repr(audit)
    values = {line for text in texts for line in text.split("\n") if line in VALUES}
    assert not any(value in written for value in values)
    assert not any(part in written for value in values for part in (value[:6], value[-6:]))
    assert KEY.decode() not in written
    assert KEY_VARIABLE not in written
    assert audit.total.rows == len(texts)
    assert sum(audit.total.findings.values()) == sum(line in VALUES for text in texts for line in text.split("\n"))


@settings(max_examples=50, deadline=None)
@given(st.lists(rows, max_size=6), st.integers(0, 6))
def test_audits_of_parts_add_up_to_the_audit_of_the_whole(texts: list[str], cut: int) -> None:
    def audited(part: list[str]) -> Audit:
        audit = REDACT.audit()
        for at, text in enumerate(part):
            audit.add(f"file {at % 2}", REDACT.find(text))
        return audit

    first, second = audited(texts[: cut - cut % 2]), audited(texts[cut - cut % 2 :])
    first.merge(Audit.from_json(json.loads(json.dumps(second.to_json()))))
    assert first.to_json() == audited(texts).to_json()
