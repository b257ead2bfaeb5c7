"""Pseudonyms: one value, one stand-in in a document; the shape stays; nobody's; nothing without the key."""

from __future__ import annotations

import re

import pytest

from llmkit.data.guard.detectors.presidio import language_of
from llmkit.data.guard.privacy import KINDS, PrivacyFilter
from llmkit.data.guard.pseudonyms import Draw

GOLDEN = "user4ffaec03@example.com 010-0262-6120"
KEY = b"a key for tests, 32 bytes long.."
GUARD = PrivacyFilter(action="pseudonymize", key=KEY)
VALUES = {
    "email": "kim.minsu@corp.co.kr",
    "phone": "010-2345-6789",
    "card": "4111 1111 1111 1111",
    "iban": "DE89 3704 0044 0532 0130 00",
    "kr_rrn": "850101-1234566",
    "cn_id": "11010519491231002X",
    "tw_id": "A123456789",
    "us_ssn": "536-22-1234",
    "ip": "52.14.8.201",
    "secret": "hf_" + "aB3d" * 9,
}


@pytest.mark.parametrize(("kind", "value"), VALUES.items())
def test_a_pseudonym_has_the_shape_of_the_value_and_is_not_found_again(kind: str, value: str) -> None:
    for document in range(40):
        text = f"값은 {value} 입니다"
        cleaned = GUARD.apply(text, document)
        assert [f.kind for f in cleaned.findings] == [kind]
        assert value not in cleaned.text
        assert GUARD.find(cleaned.text) == [], cleaned.text
        if kind not in ("email", "secret", "ip"):
            pattern = re.escape(re.sub(r"[0-9A-Za-z]", "x", value)).replace("x", "[0-9A-Za-z]")
            assert re.fullmatch(f"값은 {pattern} 입니다", cleaned.text)


@pytest.mark.parametrize(
    "phone",
    [
        "+82 10-2345-6789", "02-345-6789", "031)234-5678", "010.2345.6789", "070-7123-4567", "13812345678", "138-1234-5678", "+86 138 1234 5678",
        "0755-81234567", "0912-345-678", "(02) 2345-6789", "+886 912 345 678", "090-2345-6789", "03-3456-7890", "+81 90 2345 6789",
        "(212) 456-7890", "+1 415-456-7890", "+44 7911 123456", "+49 1512 3456789", "+33 6 12 34 56 78", "+65 9123 4567",
    ],
)  # fmt: skip
def test_the_pseudonym_of_a_phone_number_is_given_to_nobody(phone: str) -> None:
    for document in range(40):
        cleaned = GUARD.apply(f"tel {phone}", document)
        assert [f.kind for f in cleaned.findings] == ["phone"]
        assert GUARD.find(cleaned.text) == [], cleaned.text
        assert re.sub("[0-9]", "x", cleaned.text) == re.sub("[0-9]", "x", f"tel {phone}")


def test_the_same_value_has_one_pseudonym_in_a_document_however_it_is_written() -> None:
    digits = [
        re.sub("[^0-9]", "", GUARD.clean(text, "row 1"))[-8:]
        for text in ("010-2345-6789", "+82 10-2345-6789", "０１０ ２３４５ ６７８９")
    ]
    assert len(set(digits)) == 1
    assert GUARD.clean("Kim@Corp.co.kr", 1) == GUARD.clean("kim@corp.co.kr", 1)
    assert GUARD.clean("4111111111111111", 1) == GUARD.clean("4111-1111-1111-1111", 1).replace("-", "")


def test_other_documents_other_values_other_keys_other_pseudonyms() -> None:
    mail = "kim@corp.co.kr"
    other_key = PrivacyFilter(action="pseudonymize", key=b"another key of tests............")
    seen = {GUARD.clean(mail, 1), GUARD.clean(mail, 2), GUARD.clean("lee@corp.co.kr", 1), other_key.clean(mail, 1)}
    assert len(seen) == 4


def test_a_document_has_one_pseudonym_over_all_of_its_texts() -> None:
    turns = ["제 메일은 kim@corp.co.kr 입니다", "kim@corp.co.kr 로 보냈습니다"]
    pseudonyms = {re.search(r"\S+@\S+", GUARD.clean(turn, "7"))[0] for turn in turns}  # type: ignore[index]
    assert len(pseudonyms) == 1


def test_pseudonyms_do_not_change_from_version_to_version() -> None:
    """Data cleaned in parts, by two versions, must fit together: a change here is a change for users."""
    assert GUARD.clean("kim@corp.co.kr 010-2345-6789", 1) == GOLDEN


@pytest.mark.parametrize(
    ("name", "language"), [("김민수", "ko"), ("王小明", "zh"), ("たなか", "ja"), ("Jane Doe", "en")]
)
def test_names_and_addresses_stay_in_their_script(name: str, language: str) -> None:
    for kind in ("name", "address"):
        stand_in = KINDS[kind].pseudonym(name, name, Draw(KEY, 1, kind, name))  # type: ignore[index,arg-type]
        assert stand_in != name
        assert language_of(stand_in) == language or language == "ja"


def test_choices_are_even() -> None:
    draw = Draw(KEY, 1, "phone", "x")
    counts = [0] * 10
    for _ in range(5000):
        counts[draw.below(10)] += 1
    assert all(400 < count < 600 for count in counts)
