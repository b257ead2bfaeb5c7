"""Each kind: what is found, what only looks like it, in four languages."""

from __future__ import annotations

import pytest

from llmkit.data.guard.detectors import card, iban, national
from llmkit.data.guard.privacy import PrivacyFilter

GUARD = PrivacyFilter()


def found(text: str) -> list[tuple[str, str]]:
    return [(f.kind, text[f.start : f.end]) for f in GUARD.find(text)]


def finds(kind: str, text: str, value: str) -> None:
    assert found(text) == [(kind, value)]


# --- e-mail -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("메일은 kim.ms+shop@corp.co.kr로 주세요", "kim.ms+shop@corp.co.kr"),
        ("邮箱zhang_san@163.com收到", "zhang_san@163.com"),
        ("メールはyuki-s@docomo.ne.jpまで", "yuki-s@docomo.ne.jp"),
        ("<O'Brien@Mail.Example-Firm.IE>", "O'Brien@Mail.Example-Firm.IE"),
        ("mailto:a@b.io?subject=x", "a@b.io"),
        ("to a.b@c.museum.", "a.b@c.museum"),
        ("name (at) corp (dot) com", "name (at) corp (dot) com"),
        ("kim 골뱅이 naver.com", "kim 골뱅이 naver.com"),
        ("우편 user@xn--3e0b707e.kr", "user@xn--3e0b707e.kr"),
        ("(a@b.co, c)", "a@b.co"),
    ],
)  # fmt: skip
def test_email(text: str, value: str) -> None:
    finds("email", text, value)


@pytest.mark.parametrize(
    "text",
    [
        "logo@2x.png icon@3x.webp", "npm i lodash@4.17.21 react@18.2.0-beta.1", "@minsu님", "git@github.com:kim/tool.git", "me@localhost",
        "user@example.com", "a@sub.example.org", "x@y.test", "a @ b.c", "https://medium.com/@kim.minsu", "@property.setter", "3 apples @ 2.50",
        "ssh://deploy@build.corp.com/repo",
    ],
)  # fmt: skip
def test_not_an_email(text: str) -> None:
    assert found(text) == []


# --- phone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010-2345-6789로 전화", "010-2345-6789"),
        ("휴대폰01023456789입니다", "01023456789"),
        ("010.2345.6789", "010.2345.6789"),
        ("010 2345 6789 입니다", "010 2345 6789"),
        ("010-23456789", "010-23456789"),
        ("电话 020.88983080", "020.88983080"),
        ("tel=13812345678&x=1", "13812345678"),
        ("02)345-6789", "02)345-6789"),
        ("(031) 234-5678", "(031) 234-5678"),
        ("+82-10-2345-6789", "+82-10-2345-6789"),
        ("+82 (0)10-2345-6789", "+82 (0)10-2345-6789"),
        ("전화 0212345678번", "0212345678"),
        ("手机13812345678，", "13812345678"),
        ("138 1234 5678", "138 1234 5678"),
        ("电话：0755-81234567", "0755-81234567"),
        ("+8613812345678", "+8613812345678"),
        ("text me at +886953388512 please", "+886953388512"),
        ("手機0912-345-678", "0912-345-678"),
        ("(02)2345-6789", "(02)2345-6789"),
        ("携帯090-2345-6789へ", "090-2345-6789"),
        ("03-3456-7890", "03-3456-7890"),
        ("call (212) 456-7890.", "(212) 456-7890"),
        ("212-456-7890", "212-456-7890"),
        ("+1.415.456.7890", "+1.415.456.7890"),
        ("phone 2124567890", "2124567890"),
        ("+44 7911 123456", "+44 7911 123456"),
        ("주문 확인은 010-2345-6789", "010-2345-6789"),
        ("3 010-2345-6789 2", "010-2345-6789"),
        ("김민수((010)2345-6789)님", "(010)2345-6789"),
        ("010-2345-6789/02-345-6789", "010-2345-6789"),
        ("010-2345-6789/02-345-6789", "02-345-6789"),
    ],
)  # fmt: skip
def test_phone(text: str, value: str) -> None:
    assert ("phone", value) in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-15 12:30:45", "20240115", "2024.01.15", "1,234,567원", "주문번호 20240115-1234567", "1705312245123", "order 2124567890",
        "운송장 1234-5678-9012", "订单号13812345678", "ISBN 979-11-6224-123-4", "1588-1234", "080-123-4567", "0120-123-456", "400-123-4567",
        "800-555-1234", "123-45-67890", "37.566535, 126.977969", "3.14159265358979", "12345678901234567890", "가격 2,124,567,890",
        "계좌 110-234-567890", "010-0123-4567", "212-555-0123", "X-010-2345-6789", "0.66666667", "[-156.10116949]", "+ 278326125*x", "c0-.042-.003-.083 0", "532-563 (2007)", "0123456789", "clause 252.227-7013", "252.227-7013","s**2 + 13280000000*p", "<<13800000000/2=6900000000>>", "2*6900000000=13800000000","1.8389073227", "v2.010.2345.6789", "1 2 3 4 5 6 7 8 9 10",
    ],
)  # fmt: skip
def test_not_a_phone(text: str) -> None:
    assert found(text) == []


def test_national_formats_are_those_of_the_regions() -> None:
    assert PrivacyFilter(regions=["KR"]).find("212-456-7890") == []
    assert PrivacyFilter(regions=["GB"]).find("phone 020 7946 0958")[0].kind == "phone"
    assert PrivacyFilter(regions=[]).find("+82 10-2345-6789")[0].kind == "phone"


# --- cards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [
        "4111111111111111", "4111-1111-1111-1111", "5555 5555 5555 4444", "2223003122003222", "3782-822463-10005", "378282246310005",
        "6011111111111117", "3530111333300000", "6200000000000005", "6212345678901232", "3056 930902 5904",
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["카드 {}로 결제", "卡号{}。", "{}", "my card: {}, exp 12/27"])
def test_card(number: str, text: str) -> None:
    finds("card", text.format(number), number)


@pytest.mark.parametrize(
    "text",
    [
        "4111111111111112", "주문번호 4111111111111111", "order no. 4111-1111-1111-1111", "运单号4111111111111111", "IMEI 490154203237518",
        "4006381333931", "10012345678902", "41111111111111110", "SKU4111111111111111", "0.4111111111111111", "1234567890123452",
        "9999999999999995", "4111-1111-1111-1111-9999", "4111 11111111 1111",
    ],
)  # fmt: skip
def test_not_a_card(text: str) -> None:
    assert found(text) == []


def test_a_barcode_that_passes_luhn_is_no_card_without_the_word() -> None:
    """A Diners number has 14 digits, as a GTIN has."""
    assert card.is_card("30569309025904")
    assert found("30569309025904") == []
    finds("card", "Diners card 30569309025904", "30569309025904")


def test_luhn_notices_every_changed_digit() -> None:
    number = "4539578763621486"
    assert card.luhn(number)
    for at, digit in enumerate(number):
        for other in set("0123456789") - {digit}:
            assert not card.luhn(number[:at] + other + number[at + 1 :])


# --- IBAN -------------------------------------------------------------------------------------------------------------

# The examples of the IBAN registry.
IBANS = """
AD1200012030200359100100 AE070331234567890123456 AL47212110090000000235698741 AT611904300234573201 AZ21NABZ00000000137010001944
BA391290079401028494 BE68539007547034 BG80BNBG96611020345678 BH67BMAG00001299123456 BR1800360305000010009795493C1 BY13NBRB3600900000002Z00AB00
CH9300762011623852957 CR05015202001026284066 CY17002001280000001200527600 CZ6508000000192000145399 DE89370400440532013000 DK5000400440116243
DO28BAGR00000001212453611324 EE382200221020145685 EG380019000500000000263180002 ES9121000418450200051332 FI2112345600000785 FO6264600001631634
FR1420041010050500013M02606 GB29NWBK60161331926819 GE29NB0000000101904917 GI75NWBK000000007099453 GL8964710001000206 GR1601101250000000012300695
GT82TRAJ01020000001210029690 HR1210010051863000160 HU42117730161111101800000000 IE29AIBK93115212345678 IL620108000000099999999 IS140159260076545510730339
IT60X0542811101000000123456 JO94CBJO0010000000000131000302 KW81CBKU0000000000001234560101 KZ86125KZT5004100100 LB62099900000001001901229114
LI21088100002324013AA LT121000011101001000 LU280019400644750000 LV80BANK0000435195001 MC5811222000010123456789030 MD24AG000225100013104168
ME25505000012345678951 MK07250120000058984 MR1300020001010000123456753 MT84MALT011000012345MTLCAST001S MU17BOMM0101101030300200000MUR NL91ABNA0417164300
NO9386011117947 PK36SCBL0000001123456702 PL61109010140000071219812874 PS92PALS000000000400123456702 PT50000201231234567890154 QA58DOHB00001234567890ABCDEFG
RO49AAAA1B31007593840000 RS35260005601001611379 SA0380000000608010167519 SE4550000000058398257466 SI56263300012039086 SK3112000000198742637541
SM86U0322509800000000270100 TN5910006035183598478831 TR330006100519786457841326 UA213223130000026007233566001 VG96VPVG0000012345678901 XK051212012345678906
""".split()  # fmt: skip


def test_every_example_of_the_registry_is_found_whole_and_in_groups() -> None:
    assert len(IBANS) >= 70
    for number in IBANS:
        grouped = " ".join(number[at : at + 4] for at in range(0, len(number), 4))
        finds("iban", f"IBAN은 {number}입니다", number)
        finds("iban", f"an {grouped} bis morgen", grouped)
        finds("iban", f"{number.lower()}", number.lower())


@pytest.mark.parametrize(
    "text",
    ["DE88370400440532013000", "DE8937040044053201300", "DE893704004405320130001", "ZZ89370400440532013000", "GB29123460161331926819", "XDE89370400440532013000"],
)  # fmt: skip
def test_not_an_iban(text: str) -> None:
    assert ("iban", text) not in found(text)


def test_check_digits_00_01_and_99_are_never_given() -> None:
    """98 minus a remainder is between 2 and 98; 00 would pass modulo 97 where 97 does."""
    assert not any(iban.is_iban(f"DE{check}370400440532013000") for check in ("00", "01", "99"))


# --- Korea ------------------------------------------------------------------------------------------------------------


def rrn(body: str) -> str:
    """The number with its right check digit, by trying."""
    return next(body + str(last) for last in range(10) if national.rrn_check(body + str(last)))


def test_rrn_check_digits_of_citizens_and_of_foreigners() -> None:
    """Sum of digit times weight (2 to 9, 2 to 5): 11 minus the remainder, and 2 more for foreigners, both modulo 10."""
    assert rrn("800101123456") == "8001011234560"
    assert rrn("800101523456") == "8001015234563"


@pytest.mark.parametrize("number", ["8001011234560", "8001015234563", rrn("051231312345"), rrn("000229412345")])
@pytest.mark.parametrize("text", ["{}", "주민번호는 {}입니다", "我的号码{}。"])
def test_kr_rrn(number: str, text: str) -> None:
    spelled = f"{number[:6]}-{number[6:]}"
    finds("kr_rrn", text.format(spelled), spelled)
    finds("kr_rrn", text.format(number), number)


def test_numbers_since_october_2020_have_no_check_digit() -> None:
    newborn = "211015-3456789"
    assert not national.rrn_check(newborn.replace("-", ""))
    finds("kr_rrn", f"아이 {newborn}", newborn)
    finds(
        "kr_rrn", "주민등록번호 800101-1234567", "800101-1234567"
    )  # changed since then, or mistyped: a label says what it is
    assert found("800101-1234567") == []
    assert found("주문번호 211015-3456789") == []


@pytest.mark.parametrize(
    "text",
    ["801301-1234560", "800230-1234560", "800101-9234560", "주문번호 800101-1234560", "20800101-1234560", "800101-12345601", "법인등록번호 110111-1234567", "991231-3123456"],
)  # fmt: skip
def test_not_a_kr_rrn(text: str) -> None:
    assert "kr_rrn" not in dict(found(text))


def test_a_korean_barcode_with_the_form_of_an_rrn_is_a_barcode() -> None:
    """GTINs of Korea begin with 880, as do the numbers of those born in 1988."""
    both = next(
        number
        for day in range(1, 29)
        for serial in range(20000)
        if national._ean13(number := rrn(f"8801{day:02d}1{serial:05d}"))
    )
    assert found(both) == []
    finds("kr_rrn", f"주민번호 {both}", both)


# --- China ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["身份证{}", "{}", "신분증은 {}입니다", "id：{}，谢谢"])
@pytest.mark.parametrize(
    "number", ["11010519491231002X", "440524188001010014".replace("1880", "1980"), "11010519491231002x"]
)
def test_cn_id(number: str, text: str) -> None:
    if not national.is_cn_id(number.upper()):
        body = number[:17]
        number = next(body + c for c in "0123456789X" if national.is_cn_id(body + c))
    finds("cn_id", text.format(number), number)


def test_old_numbers_of_15_digits_need_their_label() -> None:
    finds("cn_id", "身份证号110105491231002", "110105491231002")
    assert "cn_id" not in dict(found("110105491231002"))


@pytest.mark.parametrize(
    "text", ["110105194912310021", "11010519491331002X", "01010519491231002X", "订单号202401151234567890", "91110108MA01ABCD2X", "1101051949123100XX"]
)  # fmt: skip
def test_not_a_cn_id(text: str) -> None:
    assert "cn_id" not in dict(found(text))


# --- Taiwan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["A123456789", "F131104093", "A800000014", "AC01234567", "AB12345677"])
@pytest.mark.parametrize("text", ["身分證{}", "{}", "ID는 {}입니다"])
def test_tw_id(number: str, text: str) -> None:
    finds("tw_id", text.format(number), number)


def test_taiwanese_numbers_in_small_letters_need_their_label() -> None:
    finds("tw_id", "身分證字號a123456789", "a123456789")
    assert found("a123456789") == []


@pytest.mark.parametrize(
    "text",
    [
        "A123456788",
        "A323456789",
        "商品編號A123456789",
        "型号A123456789",
        "SKU A123456789",
        "AA123456789",
        "A123456789B",
    ],
)
def test_not_a_tw_id(text: str) -> None:
    assert found(text) == []


# --- United States ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("536-22-1234", "536-22-1234"), ("SSN 536221234", "536221234"), ("social security number: 536 22 1234", "536 22 1234"), ("사회보장번호는 536-22-1234입니다", "536-22-1234")],
)  # fmt: skip
def test_us_ssn(text: str, value: str) -> None:
    finds("us_ssn", text, value)


@pytest.mark.parametrize(
    "text",
    ["000-22-1234", "666-22-1234", "900-22-1234", "536-00-1234", "536-22-0000", "536221234", "536 22 1234", "part no. 536-22-1234", "품번 536-22-1234", "1536-22-1234", "536-22-12345", "2024-01-15"],
)  # fmt: skip
def test_not_a_us_ssn(text: str) -> None:
    assert found(text) == []


# --- IP addresses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("접속 IP 52.14.8.201에서", "52.14.8.201"),
        ("http://52.14.8.201:8080/x", "52.14.8.201"),
        ("from 211.234.100.7.", "211.234.100.7"),
        ("ip=52.14.8.201&x", "52.14.8.201"),
        ("ip 12.3.4.5", "12.3.4.5"),
        ("GET 200 52.14.8.201 -", "52.14.8.201"),
        ("[2606:2800:220:1:248:1893:25c8:1946]", "2606:2800:220:1:248:1893:25c8:1946"),
        ("来自240e:3a1::1f，", "240e:3a1::1f"),
    ],
)  # fmt: skip
def test_ip(text: str, value: str) -> None:
    finds("ip", text, value)


@pytest.mark.parametrize(
    "text",
    [
        "1.2.3.4", "version 52.14.8.201", "버전 52.14.8.201", "v52.14.8.201", "Chrome/120.14.8.201", "foo-52.14.8.201.tar.gz", "==52.14.8.201", "version=52.14.8.201", "192.168.0.10", "10.1.2.3", "127.0.0.1", "255.255.255.0",
        "172.20.1.1", "169.254.169.254", "8.8.8.8", "1.1.1.1", "52.14.0.0", "256.1.1.1", "52.14.8", "52.14.8.201.7", "00:1a:2b:3c:4d:5e", "12:30:45", "std::vector", "2001:db8::1", "fe80::1", "2606:2800", "2.5.29.33", "1.3.101.112", "c-.87 2.83-2.12 3.51.98.32 2.03.5 3.11.5z", "0 110 1.5.75.75 0 110-1.5z",
    ],
)  # fmt: skip
def test_not_an_ip(text: str) -> None:
    assert found(text) == []


# --- secrets ----------------------------------------------------------------------------------------------------------

# Put together here, so that no scanner takes this file for a leak.
LONG = "aB3dE5gH7jK9" * 8
KEYS = [
    "AKIA" + "IOSFODNN7ABCDEFG", "ghp_" + LONG[:36], "github_pat_" + LONG[:22] + "_" + LONG[:59], "glpat-" + LONG[:20], "xoxb-" + "123456789012-1234567890123-" + LONG[:24],
    "sk-" + LONG[:20] + "T3BlbkFJ" + LONG[:20], "sk-proj-" + LONG[:64], "sk-ant-api03-" + LONG[:93] + "AA", "hf_" + LONG[:34], "AIza" + LONG[:35], "sk_live_" + LONG[:24],
    "npm_" + LONG[:36], "SG." + LONG[:22] + "." + LONG[:43], "dapi" + "0123456789abcdef" * 2, "whsec_" + LONG[:32], "pypi-AgE" + LONG[:60],
    "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0." + LONG[:43], "1234567890:AA" + LONG[:33],
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "text", ["{}", "토큰은 {}입니다", "密钥{}。", "export TOKEN={}", 'key: "{}",', "https://x.kr/?t={}&a=1"]
)
def test_secret_of_a_known_format(key: str, text: str) -> None:
    finds("secret", text.format(key), key)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("api_key = '9f8e7d6c5b4a39281706f5e4d3c2b1a0'", "9f8e7d6c5b4a39281706f5e4d3c2b1a0"),
        ("비밀번호: qT7wZ91mPx40LsVbKe22", "qT7wZ91mPx40LsVbKe22"),
        ("aws_secret_access_key=wJalr7UtnFE2I/K7MDE4G/bPx8fiCYq3zXw9Kd4", "wJalr7UtnFE2I/K7MDE4G/bPx8fiCYq3zXw9Kd4"),
        ("Authorization: Bearer 6fa459eaee8a3ca4894edb77e160355e", "6fa459eaee8a3ca4894edb77e160355e"),
        ("postgres://app:hunter2x@db.corp.kr/shop", "hunter2x"),
    ],
)
def test_secret_beside_a_word_for_it(text: str, value: str) -> None:
    finds("secret", text, value)


@pytest.mark.parametrize("what", ["RSA PRIVATE KEY", "PRIVATE KEY", "OPENSSH PRIVATE KEY", "PGP PRIVATE KEY BLOCK"])
def test_a_private_key_is_one_finding_from_begin_to_end(what: str) -> None:
    block = f"-----BEGIN {what}-----\n{LONG[:64]}\n{LONG[:64]}\n-----END {what}-----"
    finds("secret", f"여기 있습니다:\n{block}\n감사합니다", block)
    cut = block.split("\n-----END", maxsplit=1)[0]
    assert found(cut) == [("secret", cut)]


@pytest.mark.parametrize(
    "text",
    [
        "commit 9f8e7d6c5b4a39281706f5e4d3c2b1a09f8e7d6c", "etag 9f8e7d6c5b4a39281706f5e4d3c2b1a0", "6fa459ea-ee8a-3ca4-894e-db77e160355e", "api_key = YOUR_API_KEY_GOES_HERE", "password: ${DB_PASSWORD}",
        "token: xxxxxxxxxxxxxxxxxxxxxxxx", "sk-spinner-circle-large-animated-blue", "AKIAIOSFODNN7" + "EXAMPLE", "postgres://app:${PASSWORD}@db.corp.kr/shop", "the key-value-store-of-the-application",
        "-----BEGIN PUBLIC KEY-----", "eyJub3QiOiJhIGp3dCJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "token/s: 1234.5678901234567", "for key in keep_in_fp32_modules:", "key = base64.urlsafe_b64decode(key)", "private_key: ed25519.Ed25519PrivateKey,",
        "self.norm_key = Qwen4ExpTextRMSNorm(", "postgresql://scott:tiger@localhost/test", "isinstance(key, (Ed25519PublicKey, X))", "key) != AES_256_KEY_LENGTH", '_START = b"-----BEGIN OPENSSH PRIVATE KEY-----"\n_END = b"-----END OPENSSH PRIVATE KEY-----"', "https://example.com/key/some-long-path-name/of-things",
    ],
)  # fmt: skip
def test_not_a_secret(text: str) -> None:
    assert found(text) == []


def test_a_list_of_values_is_found_value_by_value() -> None:
    for kind, value in (
        ("ip", "52.14.8.201"),
        ("phone", "010-2345-6789"),
        ("phone", "212-456-7890"),
        ("email", "kim@corp.co.kr"),
        ("card", "4111-1111-1111-1111"),
        ("tw_id", "A123456789"),
        ("kr_rrn", "850101-1234566"),
        ("us_ssn", "536-22-1234"),
        ("cn_id", "11010519491231002X"),
        ("iban", "DE89370400440532013000"),
    ):
        for between in (" ", ",", ", ", "\n", "\t", "/", "|", ";", "、", "와 ", "), (", '","'):
            assert found(between.join([value] * 20)) == [(kind, value)] * 20, between
