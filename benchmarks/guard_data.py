"""Text with planted personal data and hard negatives, made without any of llmkit's code: what benchmarks/guard.py measures on.

Check digits, number plans and token formats are written here a second time, from the standards and another way round than
in the detectors (a check digit is computed, not verified), so that a mistake in one shows. Everything is random by seed
and belongs to nobody on purpose; a number can of course be somebody's by chance.
"""

from __future__ import annotations

import base64
import json
import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta

LANGUAGES = ("ko", "zh", "ja", "en")
KINDS = ("email", "phone", "card", "iban", "kr_rrn", "cn_id", "tw_id", "us_ssn", "ip", "secret")


@dataclass(frozen=True)
class Case:
    """A row; ``kind`` is what is planted at ``text[start:end]``, "" for a hard negative of the ``category``."""

    text: str
    kind: str
    category: str
    start: int
    end: int
    language: str


# --- small helpers --------------------------------------------------------------------------------------------------


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def some(rng: random.Random, alphabet: str, count: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def day(rng: random.Random, first: date, last: date) -> date:
    return first + timedelta(days=rng.randrange((last - first).days))


ALNUM = string.ascii_letters + string.digits


# --- planted values: each gives (value, needs_label) ------------------------------------------------------------------

FAMILY = "kim lee park choi jung wang li zhang chen liu tanaka suzuki sato yamada smith johnson garcia miller lin huang".split()
GIVEN = "minsu jiyoung haneul wei xiaoming yuki haruto emma olivia noah mei jun hyejin taro anna david sora lei".split()
MAIL = (
    "gmail.com naver.com daum.net hanmail.net kakao.com qq.com 163.com 126.com sina.com.cn yahoo.co.jp docomo.ne.jp outlook.com icloud.com"
    " hotmail.com pchome.com.tw hinet.net proton.me nate.com korea.ac.kr tsinghua.edu.cn u-tokyo.ac.jp ntu.edu.tw mit.edu"
).split()


def email(rng: random.Random) -> tuple[str, bool]:
    a, b, n = rng.choice(GIVEN), rng.choice(FAMILY), digits(rng, rng.randint(1, 4))
    local = rng.choice(
        [
            f"{a}.{b}",
            f"{a}_{b}{n}",
            f"{a}{n}",
            f"{a[0]}{b}",
            f"{a}-{b}",
            f"{b}.{a}+shop",
            n + a,
            f"{a}.{b}.{n}",
            digits(rng, 9),
        ]
    )
    firm = some(rng, string.ascii_lowercase, rng.randint(3, 9))
    domain = rng.choice(
        [rng.choice(MAIL)] * 5
        + [
            f"{firm}.co.kr",
            f"mail.{firm}.com.cn",
            f"{firm}-{firm[:3]}.io",
            f"{firm}.com.tw",
            f"{firm}.jp",
            f"{firm}.shop",
        ]
    )
    value = f"{local}@{domain}"
    draw = rng.random()
    if draw < 0.05:
        return value.upper(), False
    if draw < 0.08:
        return wide(value), False
    if draw < 0.10:
        return value.replace("@", "＠"), False
    if draw < 0.12:
        return hide(rng, value), False
    if draw < 0.14:
        return value.replace("@", rng.choice([" (at) ", "[at]", " [at] "])).replace(
            ".", " (dot) " if rng.random() < 0.3 else "."
        ), False
    return value, False


def wide(text: str) -> str:
    """Full-width forms."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def hide(rng: random.Random, text: str) -> str:
    """A zero-width character somewhere inside."""
    at = rng.randrange(1, len(text))
    return text[:at] + rng.choice("\u200b\u200c\u2060\ufeff\u00ad") + text[at:]


CN_MOBILE = "130 131 132 133 134 135 136 137 138 139 150 151 152 153 155 156 157 158 159 166 173 175 176 177 178 180 181 182 183 185 186 187 188 189 191 198 199".split()
US_AREA = "201 202 206 212 213 214 215 216 303 305 310 312 315 323 404 408 412 415 425 503 510 512 602 614 617 626 646 650 702 703 713 716 718 801 818 858 917 919 949 971".split()


def phone(rng: random.Random) -> tuple[str, bool]:
    """National and international spellings of numbers of five regions, and some of others."""
    parts, country, bare_is_clear = rng.choice(
        [kr_mobile] * 3 + [kr_fixed, cn_mobile, cn_mobile, cn_fixed, tw_mobile, tw_fixed, jp_mobile, jp_fixed, us, us]
    )(rng)
    draw = rng.random()
    needs_label = False
    if draw < 0.06:
        return foreign(rng), False
    if draw < 0.45:
        value = "-".join(parts)
    elif draw < 0.55:
        value = "".join(parts)
        needs_label = not bare_is_clear
    elif draw < 0.63:
        value = " ".join(parts)
    elif draw < 0.68:
        value = ".".join(parts)
    elif draw < 0.75:
        value = f"({parts[0]}){rng.choice(['', ' '])}{'-'.join(parts[1:])}"
    elif draw < 0.90:
        by = rng.choice("- ")
        first = parts[0].lstrip("0") if country != 1 else parts[0]
        value = f"+{country}{rng.choice('- ')}{first}{by}{by.join(parts[1:])}"
    elif draw < 0.93:
        first = parts[0].lstrip("0") if country != 1 else parts[0]
        value = f"+{country}{first}{''.join(parts[1:])}"
    elif draw < 0.95:
        value = parts[0] + "-" + "".join(parts[1:])
    elif draw < 0.97:
        value = rng.choice("–‐−ー－").join(parts)
        if not (parts[0] + parts[1]).isascii():
            value = "-".join(parts)
    elif draw < 0.985:
        value = wide("-".join(parts))
    else:
        value = hide(rng, "-".join(parts))
    return value, needs_label


def kr_mobile(rng: random.Random) -> tuple[list[str], int, bool]:
    return ["010", rng.choice("23456789") + digits(rng, 3), digits(rng, 4)], 82, True


def kr_fixed(rng: random.Random) -> tuple[list[str], int, bool]:
    area = rng.choice("02 02 031 032 033 041 042 043 044 051 052 053 054 055 061 062 063 064".split())
    return (
        [area, rng.choice("23456789") + digits(rng, rng.choice([2, 3]) if area != "044" else 2), digits(rng, 4)],
        82,
        False,
    )


def cn_mobile(rng: random.Random) -> tuple[list[str], int, bool]:
    return [rng.choice(CN_MOBILE), digits(rng, 4), digits(rng, 4)], 86, True


def cn_fixed(rng: random.Random) -> tuple[list[str], int, bool]:
    area, lead = rng.choice(
        [("010", "568"), ("021", "56"), ("020", "38"), ("0755", "28"), ("0571", "8"), ("025", "58")]
    )
    return [area, rng.choice(lead) + digits(rng, 7)], 86, False


def tw_mobile(rng: random.Random) -> tuple[list[str], int, bool]:
    return ["09" + rng.choice("12356789") + digits(rng, 1), digits(rng, 3), digits(rng, 3)], 886, True


def tw_fixed(rng: random.Random) -> tuple[list[str], int, bool]:
    area, count = rng.choice([("02", 4), ("04", 4), ("07", 3), ("06", 3), ("03", 3)])
    return [area, rng.choice("23" if area != "06" else "2") + digits(rng, count - 1), digits(rng, 4)], 886, False


def jp_mobile(rng: random.Random) -> tuple[list[str], int, bool]:
    return [rng.choice(["090", "080", "070"]), rng.choice("123456789") + digits(rng, 3), digits(rng, 4)], 81, True


def jp_fixed(rng: random.Random) -> tuple[list[str], int, bool]:
    area, first = rng.choice([("03", "3456"), ("06", "6"), ("045", ""), ("052", ""), ("011", ""), ("092", "")])
    exchange = rng.choice(first) + digits(rng, 3) if first else rng.choice("23456789") + digits(rng, 2)
    return [area, exchange, digits(rng, 4)], 81, False


def us(rng: random.Random) -> tuple[list[str], int, bool]:
    exchange = rng.choice("23456789") + rng.choice("023456789") + digits(rng, 1)
    return [rng.choice(US_AREA), exchange if exchange != "555" else "556", digits(rng, 4)], 1, False


def foreign(rng: random.Random) -> str:
    return rng.choice(
        [
            f"+44 7{rng.choice('4579')}{digits(rng, 2)} {digits(rng, 6)}",
            f"+49 151 {rng.choice('123456')}{digits(rng, 7)}",
            f"+33 6 {' '.join(digits(rng, 2) for _ in range(4))}",
            f"+65 9{rng.choice('0123456')}{digits(rng, 2)} {digits(rng, 4)}",
            f"+852 9{rng.choice('1234')}{digits(rng, 2)} {digits(rng, 4)}",
            f"+91 98{digits(rng, 3)} {digits(rng, 5)}",
            f"+61 4{rng.choice('0123')}{digits(rng, 1)} {digits(rng, 3)} {digits(rng, 3)}",
        ]
    )


def luhn_digit(body: str) -> str:
    """By the table of doubled digits."""
    total = sum(
        (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)[int(c)] if at % 2 == 0 else int(c) for at, c in enumerate(reversed(body))
    )
    return str(-total % 10)


def card(rng: random.Random) -> tuple[str, bool]:
    prefix, length = rng.choice(
        [("4", 16)] * 4
        + [(str(rng.randint(51, 55)), 16)] * 3
        + [
            (str(rng.randint(2221, 2720)), 16),
            (rng.choice(["34", "37"]), 15),
            (rng.choice(["34", "37"]), 15),
            (str(rng.randint(3528, 3589)), 16),
        ]
        + [(f"62{rng.choice('1258')}", rng.choice([16, 19]))] * 2
        + [("6011", 16), ("65", 16), ("36", 14), ("94", 16)]
    )
    body = prefix + digits(rng, length - len(prefix) - 1)
    number = body + luhn_digit(body)
    by = rng.choice(["", "", "-", "-", " ", " "])
    if length in (14, 15):
        value = by.join([number[:4], number[4:10], number[10:]])
    elif length == 19:
        value = number if rng.random() < 0.6 else by.join(number[at : at + 4] for at in range(0, 19, 4))
    else:
        value = by.join(number[at : at + 4] for at in range(0, 16, 4))
    draw = rng.random()
    if draw < 0.03:
        value = wide(value)
    elif draw < 0.05:
        value = hide(rng, value)
    return value, length == 14 and value.isdigit()


IBAN = "DE18n GB4a14n FR20n1c2n ES20n NL4a10n IT1a10n12c BE12n AT16n CH5n12c PL24n SE20n DK14n NO11n FI14n PT21n IE4a14n LU3n13c CZ20n HU24n RO4a16c GR7n16c AE19n SA2n18c TR6n16c IL19n KW4a22c PK4a16c BR23n1a1c GI4a15c MT4a5n18c".split()


def iban(rng: random.Random) -> tuple[str, bool]:
    spec = rng.choice(IBAN)
    country, rest, body = spec[:2], spec[2:], ""
    while rest:
        at = next(i for i, c in enumerate(rest) if c in "nac")
        body += some(
            rng,
            {"n": string.digits, "a": string.ascii_uppercase, "c": string.digits * 3 + string.ascii_uppercase}[
                rest[at]
            ],
            int(rest[:at]),
        )
        rest = rest[at + 1 :]
    remainder = 0
    for char in body + country + "00":
        for digit in char if char.isdigit() else str(ord(char) - 55):
            remainder = (remainder * 10 + int(digit)) % 97
    number = f"{country}{98 - remainder:02d}{body}"
    value = number if rng.random() < 0.5 else " ".join(number[at : at + 4] for at in range(0, len(number), 4))
    draw = rng.random()
    return (
        value.lower() if draw < 0.04 else wide(value) if draw < 0.06 else hide(rng, value) if draw < 0.08 else value
    ), False


def kr_rrn(rng: random.Random, checked: bool = False) -> tuple[str, bool]:
    """With check digit, and those given since October 2020 without one (children unlabelled, others beside a label)."""
    draw = 0.5 if checked else rng.random()
    if draw < 0.08:
        born, check = day(rng, date(2020, 10, 6), date(2026, 10, 1)), False
    else:
        born, check = day(rng, date(1930, 1, 1), date(2020, 9, 1)), draw < 0.92
    foreign_born = rng.random() < 0.15
    sex = (1 if born.year < 2000 else 3) + rng.randint(0, 1) + (4 if foreign_born else 0)
    body = f"{born:%y%m%d}{sex}{digits(rng, 5)}"
    total = 0
    for at, char in enumerate(body):
        total += int(char) * (at % 8 + 2)
    last = (11 - total % 11) % 10
    if foreign_born:
        last = (last + 2) % 10
    number = body + (str(last) if check else digits(rng, 1))
    by = rng.choice(["-"] * 6 + ["", " - "]) if check else "-"
    value = f"{number[:6]}{by}{number[6:]}"
    if rng.random() < 0.04:
        value = wide(value)
    return value, not check and born < date(2020, 10, 5)


CN_REGION = "110105 110108 120101 130102 140105 210102 220104 230103 310104 310115 320106 330106 340102 350203 360102 370102 410105 420106 430104 440305 440106 450103 460105 500103 510107 520103 530102 540102 610113 620102 630104 640104 650102 710000 810000 820000".split()


def cn_id(rng: random.Random) -> tuple[str, bool]:
    body = f"{rng.choice(CN_REGION)}{day(rng, date(1935, 1, 1), date(2022, 1, 1)):%Y%m%d}{digits(rng, 3)}"
    product = 0
    for char in body:  # ISO 7064, the recursive method
        product = (product + int(char)) * 2 % 11
    check = (12 - product) % 11
    number = body + ("X" if check == 10 else str(check))
    draw = rng.random()
    if draw < 0.05:
        return number.lower(), False
    if draw < 0.08:
        return f"{number[:6]} {number[6:14]} {number[14:]}", False
    return (wide(number) if draw < 0.11 else hide(rng, number) if draw < 0.13 else number), False


TW = {
    "A": 10,
    "B": 11,
    "C": 12,
    "D": 13,
    "E": 14,
    "F": 15,
    "G": 16,
    "H": 17,
    "I": 34,
    "J": 18,
    "K": 19,
    "L": 20,
    "M": 21,
    "N": 22,
    "O": 35,
    "P": 23,
    "Q": 24,
    "R": 25,
    "S": 26,
    "T": 27,
    "U": 28,
    "V": 29,
    "W": 32,
    "X": 30,
    "Y": 31,
    "Z": 33,
}


def tw_id(rng: random.Random) -> tuple[str, bool]:
    first = rng.choice(list(TW))
    second = rng.choice(["1", "1", "1", "2", "2", "2", "8", "9", "A", "B", "C", "D"])
    middle = digits(rng, 7)
    tens, ones = divmod(TW[first], 10)
    total = tens + 9 * ones + 8 * (TW[second] % 10 if second.isalpha() else int(second))
    for weight, char in zip(range(7, 0, -1), middle, strict=True):
        total += weight * int(char)
    number = f"{first}{second}{middle}{(10 - total % 10) % 10}"
    draw = rng.random()
    if draw < 0.04:
        return number.lower(), True
    return (wide(number) if draw < 0.07 else hide(rng, number) if draw < 0.09 else number), False


def us_ssn(rng: random.Random) -> tuple[str, bool]:
    area = rng.choice([n for n in range(1, 900) if n != 666])
    number = f"{area:03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"
    draw = rng.random()
    if draw < 0.12:
        return number.replace("-", rng.choice(["", " "])), True
    return (wide(number) if draw < 0.15 else number.replace("-", "‑") if draw < 0.18 else number), False


def ip(rng: random.Random) -> tuple[str, bool]:
    if rng.random() < 0.25:
        groups = [
            rng.choice(["2600", "2a00", "2a03", "2400", "240e", "2804", "2607"]),
            *(f"{rng.randrange(65536):x}" for _ in range(7)),
        ]
        if rng.random() < 0.5:
            return ":".join(groups[: rng.randint(3, 4)]) + "::" + ":".join(groups[-rng.randint(1, 2) :]), False
        return ":".join(groups), False
    first = rng.choice([n for n in range(3, 223) if n not in (10, 100, 127, 169, 172, 192, 198, 203)])
    return f"{first}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randint(1, 254)}", False


def secret(rng: random.Random) -> tuple[str, bool]:
    b64 = ALNUM + "-_"
    choice = rng.randrange(22)
    known: list[Callable[[], str]] = [
        lambda: "AKIA" + some(rng, string.ascii_uppercase + "234567", 16),
        lambda: rng.choice(["ghp_", "gho_", "ghs_"]) + some(rng, ALNUM, 36),
        lambda: f"github_pat_{some(rng, ALNUM, 22)}_{some(rng, ALNUM, 59)}",
        lambda: f"xoxb-{digits(rng, 12)}-{digits(rng, 13)}-{some(rng, ALNUM, 24)}",
        lambda: f"sk-{some(rng, ALNUM, 20)}T3BlbkFJ{some(rng, ALNUM, 20)}",
        lambda: f"sk-proj-{some(rng, b64, 48)}{some(rng, ALNUM, 8)}",
        lambda: "hf_" + some(rng, string.ascii_letters, 34),
        lambda: "AIza" + some(rng, b64, 34) + some(rng, ALNUM, 1),
        lambda: rng.choice(["sk_live_", "rk_live_", "sk_test_"]) + some(rng, ALNUM, 24),
        lambda: f"sk-ant-api03-{some(rng, b64, 92)}AA",
        lambda: "glpat-" + some(rng, ALNUM, 20),
        lambda: "npm_" + some(rng, ALNUM, 36),
        lambda: f"SG.{some(rng, ALNUM, 22)}.{some(rng, ALNUM, 43)}",
        lambda: jwt(rng),
        lambda: key_block(rng),
        lambda: "dapi" + some(rng, "0123456789abcdef", 32),
        lambda: "nvapi-" + some(rng, b64, 63) + "a",
        lambda: "whsec_" + some(rng, ALNUM, 32),
        lambda: "shpat_" + some(rng, "0123456789abcdef", 32),
    ]
    if choice < len(known):
        return known[choice](), False
    body = rng.choice(
        [
            some(rng, "0123456789abcdef", 32),
            some(rng, ALNUM, 40),
            some(rng, ALNUM, 24),
            str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        ]
    )
    return body, True


def jwt(rng: random.Random) -> str:
    def part(data: dict[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part({'sub': digits(rng, 8), 'iat': rng.randrange(1_700_000_000)})}.{some(rng, ALNUM + '-_', 42)}A"


def key_block(rng: random.Random) -> str:
    what = rng.choice(["RSA PRIVATE KEY", "PRIVATE KEY", "OPENSSH PRIVATE KEY", "EC PRIVATE KEY"])
    body = "\n".join(some(rng, ALNUM + "+/", 64) for _ in range(rng.randint(3, 8)))
    return f"-----BEGIN {what}-----\n{body}\n-----END {what}-----"


PLANT: dict[str, Callable[[random.Random], tuple[str, bool]]] = {
    "email": email,
    "phone": phone,
    "card": card,
    "iban": iban,
    "kr_rrn": kr_rrn,
    "cn_id": cn_id,
    "tw_id": tw_id,
    "us_ssn": us_ssn,
    "ip": ip,
    "secret": secret,
}

# --- sentences --------------------------------------------------------------------------------------------------------

# What people call each kind, by language. {v} is where the value goes; most of these stick to it in Korean and Chinese.
LABELLED: dict[str, dict[str, list[str]]] = {
    "email": {
        "ko": ["이메일은 {v}입니다.", "문의는 {v}로 보내주세요", "메일 주소: {v}", "{v}으로 세금계산서 발행 부탁드려요"],
        "zh": ["我的邮箱是{v}，谢谢", "请发送到{v}。", "電子郵件：{v}", "邮箱{v}收到了吗？"],
        "ja": ["メールは{v}までお願いします。", "連絡先：{v}", "{v}に送ってください"],
        "en": ["Reach me at {v}.", "Email: {v}", "Please cc <{v}> on that.", "mailto:{v}"],
    },
    "phone": {
        "ko": ["연락처는 {v}입니다.", "{v}로 전화 주세요", "휴대폰 {v}", "전화번호: {v} (저녁 이후)", "문자는 {v}으로 부탁드립니다", "TEL {v}"],
        "zh": ["我的手机号是{v}，请联系我", "电话：{v}", "聯絡電話{v}，謝謝", "请拨打{v}咨询", "手機 {v}"],
        "ja": ["電話番号は{v}です。", "{v}までお電話ください", "携帯：{v}", "TEL：{v}"],
        "en": ["Call me at {v} after six.", "Phone: {v}", "My cell is {v}.", "Tel. {v}", "text me at {v} please"],
    },
    "card": {
        "ko": ["카드번호 {v} 로 결제했는데 취소해 주세요", "신용카드는 {v}입니다", "{v} 카드로 결제해 주세요"],
        "zh": ["信用卡号{v}，请帮我查询", "银行卡：{v}", "卡号是{v}。"],
        "ja": ["クレジットカード番号は{v}です", "カード {v} で支払いました"],
        "en": ["My card number is {v}, exp 12/27.", "Visa {v}", "Please charge my credit card {v}.", "card: {v}"],
    },
    "iban": {
        "ko": ["IBAN은 {v}입니다", "유럽 계좌 {v}로 송금해 주세요"],
        "zh": ["IBAN：{v}", "请汇款到{v}。"],
        "ja": ["IBANは{v}です", "振込先 {v}"],
        "en": ["IBAN: {v}", "Please transfer to {v} by Friday.", "my account ({v}) was charged twice"],
    },
    "kr_rrn": {
        "ko": ["주민등록번호는 {v}입니다.", "주민번호 {v}로 조회해 주세요", "외국인등록번호: {v}"],
        "zh": ["韩国居民登录号{v}", "他的居民登錄號碼是{v}。"],
        "ja": ["住民登録番号は{v}です", "韓国の住民登録番号：{v}"],
        "en": ["My Korean resident registration number is {v}.", "RRN: {v}"],
    },
    "cn_id": {
        "ko": ["중국 신분증 번호는 {v}입니다", "신분증 {v} 확인"],
        "zh": ["身份证号{v}，请核实", "身份证：{v}", "公民身份号码为{v}。"],
        "ja": ["中国の身分証番号は{v}です", "身分証 {v}"],
        "en": ["Chinese ID: {v}", "Her ID card number is {v}."],
    },
    "tw_id": {
        "ko": ["대만 신분증 {v}", "대만 신분증 번호는 {v}입니다"],
        "zh": ["身分證字號{v}，請確認", "身分證：{v}", "居留證號碼是{v}。"],
        "ja": ["台湾の身分証番号は{v}です", "身分證 {v}"],
        "en": ["Taiwan ID: {v}", "My ROC ID number is {v}.", "ARC no. {v}"],
    },
    "us_ssn": {
        "ko": ["사회보장번호는 {v}입니다", "SSN {v}"],
        "zh": ["社会安全号码：{v}", "我的SSN是{v}"],
        "ja": ["社会保障番号は{v}です", "SSN：{v}"],
        "en": ["My SSN is {v}.", "Social security number: {v}", "SSN {v}, please update my file", "social: {v}"],
    },
    "ip": {
        "ko": ["접속 IP {v}에서 로그인했습니다", "{v}에서 접속했습니다", "IP주소는 {v}입니다"],
        "zh": ["登录IP：{v}", "来自{v}的访问", "服务器地址是{v}。"],
        "ja": ["接続元IPは{v}です", "{v}からアクセスがありました"],
        "en": ["Login from {v} failed.", "client IP {v}", "Failed password for root from {v} port 22 ssh2", '{v} - - [12/Mar/2024:10:21:07] "GET / HTTP/1.1" 200'],
    },
    "secret": {
        "ko": ["API 키는 {v}입니다", "비밀번호: {v}", "토큰 {v} 폐기해 주세요"],
        "zh": ["密钥：{v}", "我的token是{v}", "API key: {v}，请勿外传"],
        "ja": ["APIキー: token={v}", "パスワード：{v}", "トークンは {v} です"],
        "en": ["api_key = \"{v}\"", "export API_TOKEN={v}", "Authorization: Bearer {v}", "password: {v}", "my secret key is {v}"],
    },
}  # fmt: skip
UNLABELLED: dict[str, list[str]] = {
    "ko": ["{v}", "{v} 이거 맞나요?", "아까 적어드린 {v} 다시 확인 부탁드려요", "김민수({v})님이 요청했습니다", "- {v}\n- 확인함", "네, {v}요.", "{v}/홍길동/서울"],
    "zh": ["{v}", "就是{v}这个", "王小明（{v}）已提交", "您好，{v}，麻烦看一下", "資料：{v}", "{v}/李雷/北京"],
    "ja": ["{v}", "{v}で合っていますか", "山田（{v}）さんからです", "こちらです→{v}", "以下の通り：\n{v}"],
    "en": ["{v}", "it's {v}", "Jane Doe ({v}) asked for it", "Here you go: {v}", "name,value\nJane,{v}", "yes, {v}, thanks", "\"{v}\""],
}  # fmt: skip
FILLER: dict[str, list[str]] = {
    "ko": ["안녕하세요, 지난주에 3개를 주문했는데 아직 도착하지 않았습니다.", "사이즈는 270이고 색상은 검정입니다.", "오후 2시 30분에 다시 연락드리겠습니다.", "정말 감사합니다!", "배송은 보통 2~3일 걸립니다."],
    "zh": ["您好，我上周买了3件，还没有收到。", "尺码是42，颜色黑色。", "下午2点30分再联系。", "非常感谢！", "一般需要2到3天送达。"],
    "ja": ["先週3点注文しましたが、まだ届いていません。", "サイズは27.5cm、色は黒です。", "午後2時30分にまたご連絡します。", "ありがとうございます。", "通常2、3日かかります。"],
    "en": ["I bought 3 of them last week and nothing has arrived.", "The size is 10.5 and the colour is black.", "I'll be back at 2:30 pm.", "Thanks a lot!", "It usually takes 2-3 days."],
}  # fmt: skip

# --- hard negatives ---------------------------------------------------------------------------------------------------


def recent(rng: random.Random) -> date:
    return day(rng, date(2019, 1, 1), date(2026, 11, 1))


def ean(rng: random.Random, prefix: str, length: int) -> str:
    """GS1 numbers: weights 3 and 1 from the right."""
    body = prefix + digits(rng, length - len(prefix) - 1)
    return body + str(-sum(int(c) * (3 if at % 2 == 0 else 1) for at, c in enumerate(reversed(body))) % 10)


def order(rng: random.Random) -> str:
    d = recent(rng)
    return rng.choice(
        [
            f"{d:%Y%m%d}-{digits(rng, 7)}",
            f"{d:%Y%m%d}{digits(rng, rng.choice([4, 6, 8, 10]))}",
            f"ORD-{d:%Y}-{digits(rng, 6)}",
            f"{digits(rng, 3)}-{digits(rng, 7)}-{digits(rng, 7)}",
            f"{d:%y%m%d}-{digits(rng, 7)}",
            digits(rng, rng.choice([10, 11, 12, 13, 15, 16, 18, 19])),
            f"{d:%Y}-{digits(rng, 4)}-{digits(rng, 4)}",
            f"{digits(rng, 4)}-{digits(rng, 4)}-{digits(rng, 4)}",
            f"#{digits(rng, 8)}",
        ]
    )


def barcode(rng: random.Random) -> str:
    return rng.choice(
        [
            ean(
                rng,
                rng.choice(["880", "690", "693", "697", "45", "49", "471", "40", "50", "30", "978", "979", "76", "54"]),
                13,
            ),
            ean(rng, "", 12),
            ean(rng, rng.choice("1234567"), 14),
            ean(rng, "", 8),
            ean(rng, rng.choice(["3608", "3610", "5000", "4011"]), 13),
        ]
    )


def product(rng: random.Random) -> str:
    up = string.ascii_uppercase
    return rng.choice(
        [
            f"{some(rng, up, 2)}-{digits(rng, 4)}-{digits(rng, 4)}",
            f"{some(rng, up, 1)}{digits(rng, 9)}",
            f"SM-{some(rng, up, 1)}{digits(rng, 3)}N",
            f"{some(rng, up, 2)}{digits(rng, 2)} {digits(rng, 4)} {digits(rng, 4)} {digits(rng, 4)}",
            f"{some(rng, up, 3)}{digits(rng, 10)}",
            f"B0{some(rng, up + string.digits, 8)}",
            f"{digits(rng, 3)}-{digits(rng, 2)}-{digits(rng, 4)}",
            f"{digits(rng, 6)}-{digits(rng, 3)}",
            f"WH-1000XM{digits(rng, 1)}",
            f"{some(rng, up + string.digits, 5)}-{some(rng, up + string.digits, 5)}-{some(rng, up + string.digits, 5)}",
        ]
    )


def tracking(rng: random.Random) -> str:
    return rng.choice(
        [
            f"{digits(rng, 4)}-{digits(rng, 4)}-{digits(rng, 4)}",
            digits(rng, 12),
            digits(rng, 13),
            f"SF{digits(rng, 13)}",
            f"1Z{some(rng, string.ascii_uppercase + string.digits, 16)}",
            f"9400 1{digits(rng, 3)} {digits(rng, 4)} {digits(rng, 4)} {digits(rng, 4)} {digits(rng, 2)}",
            f"R{some(rng, string.ascii_uppercase, 1)}{digits(rng, 9)}{rng.choice(['KR', 'CN', 'JP'])}",
            f"YT{digits(rng, 13)}",
            digits(rng, 14),
        ]
    )


def company(rng: random.Random) -> str:
    """Numbers of firms: Korean business and corporate registration, Chinese credit codes, Taiwanese and Japanese ones."""
    return rng.choice(
        [
            f"{digits(rng, 3)}-{digits(rng, 2)}-{digits(rng, 5)}",
            f"{rng.choice(['110111', '134511', '180111', '200111'])}-{digits(rng, 7)}",
            f"91{rng.choice(['110108', '310115', '440300'])}{some(rng, string.digits + 'ABCDEFGHJKLMNPQRTUWXY', 10)}",
            digits(rng, 8),
            digits(rng, 13),
        ]
    )


def price(rng: random.Random) -> str:
    n = rng.randrange(1000, 90_000_000)
    return rng.choice(
        [
            f"{n:,}원",
            f"₩{n:,}",
            f"¥{n:,}",
            f"${n / 100:,.2f}",
            f"NT${n:,}",
            f"{n}円",
            f"{n:,}".replace(",", ".") + " EUR",
            f"{n}.00",
        ]
    )


def moment(rng: random.Random) -> str:
    d = recent(rng)
    clock = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}:{rng.randrange(60):02d}"
    return rng.choice(
        [
            f"{d:%Y-%m-%d}",
            f"{d:%Y.%m.%d} {clock}",
            f"{d:%Y-%m-%dT}{clock}.{digits(rng, 3)}Z",
            f"{d:%Y%m%d%H}{digits(rng, 4)}",
            f"{d:%d/%m/%Y}",
            f"{d:%Y年%m月%d日}",
            f"{d:%d-%m-%Y} {clock[:5]}",
            str(rng.randrange(1_500_000_000, 1_800_000_000)),
            str(rng.randrange(1_500_000_000_000, 1_800_000_000_000)),
            f"{d:%Y-%m-%d} ~ {recent(rng):%Y-%m-%d}",
            f"{d:%Y%m%d}",
        ]
    )


def version(rng: random.Random) -> str:
    n = lambda top: rng.randrange(top)  # noqa: E731
    return rng.choice(
        [
            f"{n(12)}.{n(30)}.{n(30)}.{n(30)}",
            f"v{n(20)}.{n(255)}.{n(255)}.{n(255)}",
            f"Chrome/{n(130)}.0.{n(7000)}.{n(200)}",
            f"10.0.{n(30000)}.{n(900)}",
            f"lodash@{n(9)}.{n(30)}.{n(30)}",
            f"numpy=={n(3)}.{n(30)}.{n(9)}",
            f"{n(99)}.{n(99)}.{n(255)}.{n(255)}",
            f"react@{n(19)}.{n(9)}.0-beta.{n(9)}",
            f"libfoo-{n(99)}.{n(255)}.{n(255)}.{n(99)}.tar.gz",
        ]
    )


def hexes(rng: random.Random) -> str:
    h = "0123456789abcdef"
    return rng.choice(
        [
            some(rng, h, 40),
            some(rng, h, 32),
            some(rng, h, 64),
            str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            ":".join(some(rng, h, 2) for _ in range(6)),
            ":".join(some(rng, h, 2) for _ in range(8)),
            "#" + some(rng, h, 6),
            f"sha256:{some(rng, h, 64)}",
            f"data:image/png;base64,{some(rng, ALNUM + '+/', 60)}",
        ]
    )


def handle(rng: random.Random) -> str:
    name = rng.choice(GIVEN) + digits(rng, 2)
    return rng.choice(
        [f"@{name}", "logo@2x.png", f"{name}@", f"icon-{name}@3x.webp", f"https://t.me/@{name}", f"git@github.com:{name}/tool.git", f"{name}@localhost", "sk-spinner-circle-large-animated-blue", "YOUR_API_KEY_GOES_HERE", f"user@{name}", "a @ b.c 1.5"]
    )  # fmt: skip


def other(rng: random.Random) -> str:
    body = rng.choice(["35", "86", "01"]) + digits(rng, 12)
    return rng.choice(
        [
            body + luhn_digit(body),  # IMEI
            "8982" + digits(rng, 15),  # SIM card
            f"{digits(rng, 2)}.{digits(rng, 6)},{digits(rng, 3)}.{digits(rng, 6)}",  # a place on the map
            f"3.{digits(rng, 15)}",
            f"IMG_{recent(rng):%Y%m%d}_{digits(rng, 6)}.jpg",
            f"192.168.{rng.randrange(256)}.{rng.randrange(256)}",
            f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}",
            f"{digits(rng, 3)}-{digits(rng, 4)}",  # a Japanese post code
            f"{digits(rng, 5)}-{digits(rng, 4)}",  # ZIP+4
            " ".join(digits(rng, rng.randint(1, 4)) for _ in range(6)),
            f"{digits(rng, 3)},{digits(rng, 3)},{digits(rng, 3)}",
            f"{rng.randrange(24):02d}:{rng.randrange(60):02d}-{rng.randrange(24):02d}:{rng.randrange(60):02d}",
            f"{digits(rng, 3)}x{digits(rng, 3)}x{digits(rng, 3)}mm",
            f"ISBN 979-11-{digits(rng, 4)}-{digits(rng, 3)}-{digits(rng, 1)}",
        ]
    )


def broken(kind: str) -> Callable[[random.Random], str]:
    """Near misses of a kind with a check digit: the last digit is another one, which every check here notices."""

    def make(rng: random.Random) -> str:
        while True:
            value, _ = kr_rrn(rng, checked=True) if kind == "kr_rrn" else PLANT[kind](rng)
            if value.isascii():
                at = max(place for place, char in enumerate(value) if char.isdigit())
                return value[:at] + rng.choice([c for c in string.digits if c != value[at]]) + value[at + 1 :]

    return make


LABELS: dict[str, dict[str, list[str]]] = {
    "order": {"ko": ["주문번호 {v}", "주문 {v} 건 취소해 주세요", "예약번호는 {v}입니다"], "zh": ["订单号：{v}", "订单{v}还没发货", "訂單編號{v}"], "ja": ["注文番号{v}", "注文{v}をキャンセルしたい", "予約番号は{v}です"], "en": ["Order {v} is late", "order no. {v}", "Order ID: {v}", "Booking reference {v}"]},
    "barcode": {"ko": ["바코드 {v}", "상품 바코드: {v}"], "zh": ["条形码{v}", "條碼：{v}"], "ja": ["JANコード {v}", "バーコード：{v}"], "en": ["EAN {v}", "barcode: {v}", "GTIN {v}", "UPC {v}"]},
    "product": {"ko": ["상품코드 {v}", "모델명 {v}", "품번: {v}"], "zh": ["商品编号{v}", "型号{v}", "貨號：{v}"], "ja": ["商品番号{v}", "型番：{v}"], "en": ["SKU {v}", "item {v}", "Model {v} is out of stock", "part number {v}"]},
    "tracking": {"ko": ["운송장번호 {v}", "송장 {v} 조회", "등기번호 {v}"], "zh": ["快递单号{v}", "运单号：{v}", "物流{v}"], "ja": ["追跡番号{v}", "伝票番号：{v}", "お問い合わせ番号は{v}です"], "en": ["Tracking number {v}", "parcel {v}", "AWB {v}", "tracking: {v}"]},
    "company": {"ko": ["사업자등록번호 {v}", "법인등록번호 {v}"], "zh": ["统一社会信用代码{v}", "統一編號：{v}"], "ja": ["法人番号{v}", "登録番号：{v}"], "en": ["Business registration {v}", "company number {v}"]},
    "price": {"ko": ["가격은 {v}입니다", "총 {v} 결제"], "zh": ["价格{v}", "一共{v}"], "ja": ["価格は{v}", "合計{v}"], "en": ["It costs {v}", "Total {v}"]},
    "moment": {"ko": ["{v}에 도착", "일시: {v}"], "zh": ["{v}到货", "时间：{v}"], "ja": ["{v}に届きました", "日時：{v}"], "en": ["delivered {v}", "created at {v}"]},
    "version": {"ko": ["버전 {v}", "펌웨어 {v}로 업데이트"], "zh": ["版本{v}", "升级到{v}版本"], "ja": ["バージョン{v}", "ver. {v}"], "en": ["version {v}", "upgrade to release {v}", "see section {v}", "firmware {v}"]},
    "hexes": {"ko": ["커밋 {v}", "해시값 {v}"], "zh": ["提交{v}", "哈希：{v}"], "ja": ["コミット{v}", "ハッシュ：{v}"], "en": ["commit {v}", "checksum {v}", "etag: {v}", "request id {v}"]},
    "handle": {"ko": ["{v} 참고"], "zh": ["见{v}"], "ja": ["{v}を参照"], "en": ["see {v}", "{v} is used"]},
    "other": {"ko": ["참고: {v}", "기기 {v}"], "zh": ["参考：{v}", "设备{v}"], "ja": ["参考：{v}", "端末{v}"], "en": ["ref {v}", "device {v}", "IMEI {v}"]},
    "broken": {"ko": ["코드 {v}", "관리번호 {v}", "값은 {v}"], "zh": ["编号{v}", "代码：{v}", "数值{v}"], "ja": ["コード{v}", "管理番号：{v}", "値は{v}"], "en": ["code {v}", "asset {v}", "value {v}", "job {v}"]},
}  # fmt: skip
NEGATIVES: dict[str, Callable[[random.Random], str]] = {
    "order": order, "barcode": barcode, "product": product, "tracking": tracking, "company": company, "price": price, "moment": moment, "version": version, "hexes": hexes, "handle": handle, "other": other
} | {f"broken {kind}": broken(kind) for kind in ("card", "iban", "kr_rrn", "cn_id", "tw_id")}  # fmt: skip
# Words that were written after the detectors were finished and that they were not changed for: what a reader's data is like.
UNSEEN: dict[str, dict[str, list[str]]] = {
    "negative": {
        "ko": ["수험번호 {v}", "보증서 {v} 첨부합니다", "작업지시 {v} 완료", "접수증 {v}", "게시글 {v} 삭제 요청", "검침 지침은 {v}", "추첨 결과 {v}", "{v} 로 확인되는 출고 건"],
        "zh": ["工单{v}已处理", "取件码{v}", "考号：{v}", "档案{v}", "户号{v}", "学号{v}", "票据{v}作废", "仓位{v}"],
        "ja": ["受験番号{v}", "整理券：{v}", "検査票{v}", "申込{v}", "お客様控え{v}", "作業指示{v}は完了", "点検票{v}"],
        "en": ["docket {v}", "locker {v}", "manifest {v} was closed", "work request {v}", "lab sample {v}", "meter reading {v}", "run {v} finished", "sensor {v}", "plate {v}"],
    },
    "planted": {
        "ko": ["{v} 부탁드려요", "제 거는 {v}예요", "고객이 남긴 값: {v}", "확인해 보니 {v}이었습니다", "변경 전 {v}, 변경 후 없음", "상담원님 {v} 맞습니다"],
        "zh": ["麻烦记一下{v}", "客户留的是{v}", "改成{v}吧", "旧的是{v}，已作废", "我这边是{v}哦", "备注：{v}"],
        "ja": ["{v}と書いてありました", "こちらの控えは{v}です", "{v}に変更してください", "備考：{v}", "以前は{v}でした"],
        "en": ["he wrote {v} on the form", "change it to {v}", "notes: {v}", "old one: {v}, no longer used", "I think {v} is mine", "the agent typed {v} by mistake"],
    },
}  # fmt: skip
UNSEEN_FILLER: dict[str, list[str]] = {
    "ko": ["어제 방문했을 때 직원분이 친절했어요.", "환불은 언제쯤 되나요?"],
    "zh": ["昨天去店里，店员很热情。", "什么时候能退款？"],
    "ja": ["昨日お店に伺いました。", "返金はいつ頃になりますか。"],
    "en": ["The clerk at the store was kind.", "When will I get the refund?"],
}
UNLABELLED_SHARE = 0.35  # of planted values and of hard negatives
# Without a word beside it nobody can tell these from a social security number or an IP address: they always have one.
AMBIGUOUS = re.compile(r"[0-9]{3}-[0-9]{2}-[0-9]{4}|[0-9]{1,3}(?:\.[0-9]{1,3}){3}")


def _case(rng: random.Random, template: str, value: str, language: str, kind: str, category: str) -> Case:
    start = template.index("{v}")
    text = template.replace("{v}", value)
    if rng.random() < 0.4:
        filler = rng.choice(FILLER[language])
        if rng.random() < 0.5:
            text, start = f"{filler} {text}", start + len(filler) + 1
        else:
            text = f"{text} {filler}"
    return Case(text, kind, category, start, start + len(value), language)


def unseen(kind: str, count: int, seed: int) -> list[Case]:
    """Rows in sentences the detectors were not made with: ``count`` with ``kind`` planted, or hard negatives where it is ""."""
    rng = random.Random(f"{seed} unseen {kind}")
    names = list(NEGATIVES)
    sentences = UNSEEN["planted" if kind else "negative"]
    cases: list[Case] = []
    while len(cases) < count:
        language = LANGUAGES[len(cases) % len(LANGUAGES)]
        category = "unseen" if kind else names[len(cases) // len(LANGUAGES) % len(names)]
        value, needs_label = PLANT[kind](rng) if kind else (NEGATIVES[category](rng), False)
        if not needs_label and "\n" not in value:  # what only counts beside a label is not planted without one
            template = rng.choice(sentences[language])
            filler = rng.choice(UNSEEN_FILLER[language]) + " " if rng.random() < 0.4 else ""
            start = len(filler) + template.index("{v}")
            cases.append(
                Case(filler + template.replace("{v}", value), kind, category, start, start + len(value), language)
            )
    return cases


def planted(kind: str, count: int, seed: int) -> list[Case]:
    """``count`` rows with one value of ``kind`` each, the languages in turn."""
    rng = random.Random(f"{seed} {kind}")
    cases = []
    for at in range(count):
        language = LANGUAGES[at % len(LANGUAGES)]
        value, needs_label = PLANT[kind](rng)
        labelled = needs_label or rng.random() >= UNLABELLED_SHARE
        template = rng.choice(LABELLED[kind][language] if labelled else UNLABELLED[language])
        if "\n" in value:
            template = f"{template.split('{v}')[0]}{{v}}"
        cases.append(_case(rng, template, value, language, kind, "labelled" if labelled else "unlabelled"))
    return cases


def negatives(count: int, seed: int) -> list[Case]:
    """``count`` rows with something that looks like personal data and is none, the categories in turn."""
    rng = random.Random(f"{seed} negatives")
    names = list(NEGATIVES)
    cases = []
    for at in range(count):
        category = names[at % len(names)]
        language = LANGUAGES[at // len(names) % len(LANGUAGES)]
        value = NEGATIVES[category](rng)
        labelled = rng.random() >= UNLABELLED_SHARE or bool(AMBIGUOUS.fullmatch(value))
        template = rng.choice(LABELS[category.split()[0]][language] if labelled else UNLABELLED[language])
        cases.append(_case(rng, template, value, language, "", category))
    return cases
