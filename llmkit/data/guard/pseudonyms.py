"""Stand-ins for personal values: the same value gets the same one in a document, another one in the next.

A pseudonym is made of HMAC-SHA-256 (RFC 2104) of document, kind and value under a key that only its owner has, so that
nobody without the key can test a guess. It keeps the shape of the value, and it can belong to nobody: a domain, number
or range that is reserved, not assigned, or has a wrong check digit. So the guard does not find it again.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterator

from llmkit.data.guard.detectors.card import luhn
from llmkit.data.guard.detectors.presidio import language_of
from llmkit.data.guard.kinds import KEY_VARIABLE, Kind
from llmkit.errors import MissingError

_MIN_KEY = 16
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def key_from_environment() -> bytes:
    """The key in ``LLMKIT_PSEUDONYM_KEY``. Raises MissingError when it is not set or too short to keep a secret."""
    key = os.environ.get(KEY_VARIABLE, "").strip().encode()
    if len(key) < _MIN_KEY:
        what = f"is shorter than {_MIN_KEY} characters" if key else "is not set"
        raise MissingError(
            f"{KEY_VARIABLE} {what}: pseudonyms are made with a secret key, which is never part of a recipe. Make one and keep it:"
            f" export {KEY_VARIABLE}=$(python3 -c 'import secrets; print(secrets.token_hex(32))')"
        )
    return key


class Draw:
    """Choices that depend on key, document, kind and value alone: a stream of HMAC blocks."""

    def __init__(self, key: bytes, document: str | int, kind: Kind, canonical: str) -> None:
        self._key = key
        self._seed = "\0".join((str(document), kind, canonical)).encode("utf-8", "surrogatepass")
        self._bytes = self._stream()

    def _stream(self) -> Iterator[int]:
        block = 0
        while True:
            yield from hmac.new(self._key, self._seed + block.to_bytes(4, "big"), hashlib.sha256).digest()
            block += 1

    def below(self, limit: int) -> int:
        """A number from 0 to ``limit`` - 1 (``limit`` up to 2**32); the bias is below one in a million million."""
        wide = int.from_bytes(bytes(next(self._bytes) for _ in range(9)), "big")
        return wide % limit

    def digits(self, count: int) -> str:
        return "".join(str(self.below(10)) for _ in range(count))

    def letters(self, count: int, of: str = "abcdefghijklmnopqrstuvwxyz") -> str:
        return "".join(of[self.below(len(of))] for _ in range(count))

    def hex(self, count: int) -> str:
        return self.letters(count, "0123456789abcdef")


# --- one function a kind: the value as written, its canonical form, choices -------------------------------------------


def email(_value: str, _canonical: str, draw: Draw) -> str:
    """An address at example.com, which RFC 2606 keeps for examples."""
    return f"user{draw.hex(8)}@example.com"


# Country code to how national numbers begin that its plan gives to nobody; 00 anywhere else.
_UNASSIGNED = {"82": "100", "86": "10", "81": "100", "886": "10"}


def phone(value: str, canonical: str, draw: Draw) -> str:
    """A number of the same shape that is assigned to nobody: 010-0xxx-xxxx in Korea, 555-01xx in North America …"""
    country, national = canonical[1:].split(" ")
    digits = re.sub(r"[^0-9]", "", value)
    if country == "1":
        new = f"{2 + draw.below(7)}{1 + draw.below(8)}{draw.below(10)}55501{draw.digits(2)}"
    else:
        new = (_UNASSIGNED.get(country, "00") + draw.digits(len(national)))[: len(national)]
    return _fill(value, digits[: len(digits) - len(national)] + new)


def card(value: str, canonical: str, draw: Draw) -> str:
    """The same network and grouping, with a check digit that is wrong."""
    body = canonical[0] + draw.digits(len(canonical) - 2)
    right = next(str(last) for last in range(10) if luhn(f"{body}{last}"))
    return _fill(value, body + str((int(right) + 1 + draw.below(9)) % 10))


def iban(value: str, canonical: str, draw: Draw) -> str:
    """The same country, with check digits 00, which ISO 13616 never gives."""
    body = re.sub(
        r"[0-9]", lambda _: draw.digits(1), re.sub(r"[A-Z]", lambda _: draw.letters(1, CAPITALS), canonical[4:])
    )
    return _fill(value, f"{canonical[:2]}00{body}")


def kr_rrn(value: str, _canonical: str, draw: Draw) -> str:
    """A number of somebody born in the 1800s: the seventh digit is 9 or 0."""
    return _fill(value, f"{_birthday(draw)}{'90'[draw.below(2)]}{draw.digits(6)}")


def cn_id(value: str, canonical: str, draw: Draw) -> str:
    """A number of the province 99, which is none; of 18 or 15 characters, as the value."""
    year = "19" if len(canonical) == 18 else ""
    return _fill(value, f"99{draw.digits(4)}{year}{_birthday(draw)}{draw.digits(len(canonical) - len(year) - 12)}")


def tw_id(value: str, canonical: str, draw: Draw) -> str:
    """A letter, then 0, which stands for no sex and no residence."""
    return _fill(value, f"{draw.letters(1, CAPITALS)}0{draw.digits(len(canonical) - 2)}")


def us_ssn(value: str, _canonical: str, draw: Draw) -> str:
    """An area above 899 (never given) and a group below 50 (not one of the tax office's either)."""
    return _fill(value, f"9{draw.digits(2)}{1 + draw.below(49):02d}{draw.digits(4)}")


def ip(value: str, _canonical: str, draw: Draw) -> str:
    """An address of 198.18.0.0/15 (RFC 2544) or 2001:db8::/32 (RFC 3849), which no machine on the internet has."""
    if ":" in value:
        return "2001:db8:" + ":".join(draw.hex(4) for _ in range(6))
    return f"198.{18 + draw.below(2)}.{draw.below(256)}.{1 + draw.below(254)}"


def secret(_value: str, _canonical: str, draw: Draw) -> str:
    """A word in capitals: a natural-looking key would be taken for a real one."""
    return f"REDACTED_SECRET_{draw.hex(8).upper()}"


_NAMES = {
    "ko": ("김 이 박 최 정 강 조 윤 장 임 한 오 서 신 권 황".split(), "가람 나래 다온 라온 마루 바다 새봄 아라 한결 이든 보람 슬기 하늘 초롱 누리 미르".split()),
    "zh": ("王 李 张 刘 陈 杨 赵 黄 周 吴 徐 孙 胡 朱 高 林".split(), "甲一 乙二 丙文 丁安 戊明 己和 庚新 辛平 壬心 癸远 子青 丑成 寅然 卯宁 辰星 巳言".split()),
    "ja": ("佐藤 鈴木 高橋 田中 渡辺 伊藤 山本 中村 小林 加藤 吉田 山田 松本 井上 木村 清水".split(), "あおい はると ゆい そら ひなた みなと つむぎ れん いつき ほのか かえで りく しおり なお あきら めぐみ".split()),
    "en": ("Smith Jones Brown Taylor Wilson Davis Clark Lewis Walker Young King Wright Hill Green Baker Adams".split(), "Alex Sam Jordan Taylor Casey Morgan Riley Jamie Avery Quinn Robin Drew Kerry Dana Lee Pat".split()),
}  # fmt: skip


def name(value: str, _canonical: str, draw: Draw) -> str:
    """A common name in the script of the value."""
    language = language_of(value)
    families, given = _NAMES[language]
    family, first = families[draw.below(len(families))], given[draw.below(len(given))]
    return f"{first} {family}" if language == "en" else f"{family} {first}" if language == "ja" else family + first


_ADDRESSES = {
    "ko": "예시시 견본구 가상로 {}",
    "zh": "示例市样本区虚构路{}号",
    "ja": "例示市見本町{}",
    "en": "{} Sample Street, Exampletown",
}


def address(value: str, _canonical: str, draw: Draw) -> str:
    """A place that is none, in the script of the value."""
    return _ADDRESSES[language_of(value)].format(1 + draw.below(9999))


def _fill(shape: str, characters: str) -> str:
    """``shape`` with its letters and digits replaced in order; separators stay."""
    new = iter(characters)
    return "".join(next(new, "") if char.isalnum() else char for char in shape)


def _birthday(draw: Draw) -> str:
    """YYMMDD of some day."""
    return f"{draw.below(100):02d}{1 + draw.below(12):02d}{1 + draw.below(28):02d}"
