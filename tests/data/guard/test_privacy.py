"""The filter as its users see it: what find, clean and apply give back, and what a wrong set-up says."""

from __future__ import annotations

import pickle
import sys
from typing import get_args

import pytest

from llmkit.data.guard.kinds import DEFAULT_KINDS, KEY_VARIABLE, Finding, Kind
from llmkit.data.guard.privacy import KINDS, PrivacyFilter
from llmkit.errors import MissingError, UsageError

KEY = b"a key for tests, 32 bytes long.."
MIXED = "김민수 010-2345-6789, kim@corp.co.kr, 카드 4111-1111-1111-1111, IBAN DE89 3704 0044 0532 0130 00"


def test_every_kind_has_a_detector_and_the_order_of_the_type_is_that_of_the_table() -> None:
    assert tuple(KINDS) == get_args(Kind)
    assert set(DEFAULT_KINDS) == set(KINDS) - {"name", "address"}


def test_findings_are_in_order_and_say_where() -> None:
    found = PrivacyFilter().find(MIXED)
    assert [(f.kind, MIXED[f.start : f.end]) for f in found] == [
        ("phone", "010-2345-6789"),
        ("email", "kim@corp.co.kr"),
        ("card", "4111-1111-1111-1111"),
        ("iban", "DE89 3704 0044 0532 0130 00"),
    ]


def test_only_the_kinds_asked_for_are_found() -> None:
    assert [f.kind for f in PrivacyFilter(["email"]).find(MIXED)] == ["email"]


def test_redaction_puts_the_kind_in_the_place_of_the_value() -> None:
    guard = PrivacyFilter(action="redact")
    assert guard.clean(MIXED, 1) == "김민수 <PHONE>, <EMAIL>, 카드 <CARD>, IBAN <IBAN>"


@pytest.mark.parametrize("action", ["report", "drop", "error"])
def test_the_other_actions_leave_the_text_as_it_is(action: str) -> None:
    cleaned = PrivacyFilter(action=action).apply(MIXED, 1)  # type: ignore[arg-type]
    assert cleaned.text == MIXED
    assert len(cleaned.findings) == 4


def test_apply_says_what_was_in_the_text_before() -> None:
    cleaned = PrivacyFilter(action="redact").apply("mail kim@corp.co.kr", 1)
    assert cleaned == ("mail <EMAIL>", [Finding("email", 5, 19)])


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "안녕하세요", "12", "\u200b", "😀" * 50, "\x00", "\ud800 lone surrogate"]
)
def test_text_without_personal_data_comes_back_unchanged(text: str) -> None:
    assert PrivacyFilter(action="redact").apply(text, 1) == (text, [])


# --- overlaps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("01023456789@naver.com", "email", "01023456789@naver.com"),
        ("https://kim:s3cr3tpw9@mail.corp.co.kr/x", "secret", "s3cr3tpw9"),
        ("IBAN FR14 2004 1010 0505 0001 3M02 606", "iban", "FR14 2004 1010 0505 0001 3M02 606"),
        ("身份证11010519491231002X", "cn_id", "11010519491231002X"),
    ],
)
def test_the_most_specific_kind_wins(text: str, kind: str, value: str) -> None:
    assert [(f.kind, text[f.start : f.end]) for f in PrivacyFilter().find(text)] == [(kind, value)]


# --- normal forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("전화 ０１０－２３４５－６７８９입니다", "０１０－２３４５－６７８９"),
        ("携帯は090ー2345ー6789です", "090ー2345ー6789"),
        ("010\u200b-2345-\u20606789", "010\u200b-2345-\u20606789"),
        ("전화 010–2345–6789로", "010–2345–6789"),
        ("tel 010\u00a02345\u00a06789", "010\u00a02345\u00a06789"),
        ("邮箱ｌｉ＠ｑｑ．ｃｏｍ，谢谢", "ｌｉ＠ｑｑ．ｃｏｍ"),
        ("٠١٠-٢٣٤٥-٦٧٨٩", "٠١٠-٢٣٤٥-٦٧٨٩"),
    ],
)
def test_wide_hidden_and_foreign_characters_hide_nothing(text: str, value: str) -> None:
    found = PrivacyFilter().find(text)
    assert [text[f.start : f.end] for f in found] == [value]


def test_a_value_deep_in_a_long_text_is_found_with_its_label() -> None:
    text = "가나다 " * 4000 + "주민번호는 850101-1234567이고 " + "hello world " * 4000
    (found,) = PrivacyFilter().find(text)
    assert text[found.start : found.end] == "850101-1234567"


# --- set-up -----------------------------------------------------------------------------------------------------------


def test_an_unknown_kind_action_or_region_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no such kind of personal data: passport; there are secret"):
        PrivacyFilter(["passport"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="no such action: hide; there are report"):
        PrivacyFilter(action="hide")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no phone numbers are known for XX"):
        PrivacyFilter(regions=["KR", "XX"])


def test_a_missing_phone_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(MissingError, match=r"phonenumbers is not installed.*llmkit\[guard\]"):
        PrivacyFilter()
    PrivacyFilter(["email"])  # what does not need it works without it


@pytest.mark.parametrize("kind", ["name", "address"])
def test_names_without_presidio_name_the_extra(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.data.guard.detectors.presidio.find_spec", lambda _name: None)
    with pytest.raises(MissingError, match=r"presidio-analyzer is not installed.*llmkit\[presidio\]"):
        PrivacyFilter([kind])


def test_presidio_without_a_language_model_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    only_presidio = lambda name: True if name == "presidio_analyzer" else None  # noqa: E731
    monkeypatch.setattr("llmkit.data.guard.detectors.presidio.find_spec", only_presidio)
    with pytest.raises(MissingError, match="python -m spacy download en_core_web_lg"):
        PrivacyFilter(["name"])


@pytest.mark.parametrize(("value", "what"), [(None, "is not set"), ("", "is not set"), ("short", "is shorter than 16")])
def test_pseudonyms_without_a_good_key_say_how_to_make_one(
    value: str | None, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(MissingError, match=rf"{KEY_VARIABLE} {what}.*secrets.token_hex"):
        PrivacyFilter(action="pseudonymize")


def test_the_key_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY.decode())
    assert PrivacyFilter(action="pseudonymize").clean(MIXED, 1) == PrivacyFilter(action="pseudonymize", key=KEY).clean(
        MIXED, 1
    )


def test_the_key_is_never_shown() -> None:
    guard = PrivacyFilter(action="pseudonymize", key=KEY)
    assert KEY.decode() not in repr(guard) + str(guard)


def test_a_filter_goes_to_another_process_and_does_the_same_there() -> None:
    guard = PrivacyFilter(action="pseudonymize", key=KEY, regions=["KR"])
    assert pickle.loads(pickle.dumps(guard)).clean(MIXED, 7) == guard.clean(MIXED, 7)
