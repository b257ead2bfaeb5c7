"""What the words beside a number say that it is: "order no.", "카드번호", "手机号" …

A number alone often is ambiguous: one in ten order numbers passes a check digit by chance. People write what a number
is, and usually right before it; so a label decides where the number itself cannot.
"""

from __future__ import annotations

import re
from typing import Literal

Label = Literal["other", "card", "phone", "kr_rrn", "cn_id", "tw_id", "us_ssn", "iban", "ip", "secret"]

# Words of Latin letters match as whole words, in any case; the other scripts anywhere, for they write without spaces.
_LATIN: dict[Label, str] = {
    "other": r"""orders? | p/?o | invoices? | tracking | trk | waybill | awb | parcel | shipments? | shipping | consignment | serial
        | s/n | sku | models? | parts? | p/n | mpn | items? | products? | articles? | art | catalogu?e? | barcodes? | ean(?:-?1?[38])? | gtin(?:-?1[234])?
        | upc(?:-a)? | jan | isbn(?:-?1[03])? | issn | asin | imei | iccid | lots? | batch | tickets? | case | ref | reference | transactions?
        | txn | receipts? | bookings? | reservations? | confirmation | coupons? | vouchers? | members? | customers? | accounts? | acct
        | contracts? | polic(?:y|ies) | claims? | versions? | ver | v | release | builds? | firmware | driver | price | amount | total
        | quantity | qty | section | chapter | clause | figure | table | oid | timestamp | epoch | codes? | sn | pn
        | patents? | docket | filing | registration | warehouse | pallet | container | hs | doi | company | corporat(?:e|ion) | business | vat | tax""",
    "card": r"""(?:credit|debit|payment|bank|gift)? \s? cards? (?:\s?(?:no|number|num))? | visa | master\s?card | amex | american\sexpress
        | union\s?pay | jcb | diners | discover | pan | cc""",
    "phone": r"""(?:tele)?phones? | tel | mobile | cell(?:phone|ular)? | fax | call(?:s|ed|ing)? | dial | hotline | whats\s?app | sms
        | text\sme | contact | ring | hp | m\.p | voicemail | landline""",
    "kr_rrn": r"rrn | (?:korean?\s)?resident\s(?:registration|reg)(?:\s(?:no|number))? | (?:alien|foreigner)\sregistration(?:\s(?:no|number))? | jumin",
    "cn_id": r"(?:chinese|prc|resident|citizen|national)\s(?:id|identity)(?:\scard)?(?:\s(?:no|number))? | id\scard(?:\s(?:no|number))? | identity\s(?:card|number)",
    "tw_id": r"(?:taiwan(?:ese)?|roc)\s(?:national\s)?id(?:\scard)?(?:\s(?:no|number))? | arc(?:\s(?:no|number))? | ui\s(?:no|number)",
    "us_ssn": r"ssn | ss\# | social(?:\ssecurity)?(?:\s(?:no|number|num|\#))? | soc\ssec",
    "iban": r"iban",
    "ip": r"ip(?:v[46])? (?:\s?(?:address|addr))? | client | host | peer | remote(?:\saddr(?:ess)?)? | from\sip | x-forwarded-for | login\sfrom",
    "secret": r"""(?:api|access|secret|private|auth|encryption|signing|client|account|storage|shared|service)[_\s-]?(?:key|token|secret)s?
        | key | token | secret | password | passwd | passphrase | pwd | credentials? | bearer | authorization | webhook""",
}
_OTHER_SCRIPTS: dict[Label, str] = {
    "other": """주문 송장 운송장 등기 배송조회 택배 상품번호 상품코드 제품번호 제품코드 품번 모델 시리얼 일련번호 제조번호 바코드 로트 접수번호 예약번호 승인번호 거래번호
        영수증 사업자 법인등록 법인번호 통관 버전 가격 금액 수량 쿠폰 계약번호 관리번호 고객번호 회원번호 계좌 사원번호 학번 차대번호 증권번호 허가번호 특허 문서번호 사건번호 티켓 발주 입고 재고 코드 품목 펌웨어 조항
        订单 訂單 快递 快遞 运单 運單 物流 单号 單號 追踪 追蹤 包裹 流水号 流水號 交易号 交易號 商品编号 商品編號 商品码 商品碼 商品代码 产品编号 產品編號 货号 貨號 型号 型號
        条形码 條碼 条码 條形碼 序列号 序號 批号 批號 发票 發票 合同号 合約 合约 版本 价格 價格 金额 金額 数量 數量 编号 編號 统一编号 統編 会员号 會員 客户号 客戶 账号 帳號 账户 优惠码 信用代码 库存 固件 保单 案号
        注文番号 注文 伝票 追跡番号 問い合わせ番号 お問い合わせ番号 商品番号 品番 型番 製造番号 シリアル コード 予約番号 受付番号 取引番号 管理番号 ロット バージョン 価格 金額 税込 会員番号 顧客番号 口座 納品書 請求書 領収書 在庫 法人番号""",
    "card": "카드 신용카드 체크카드 信用卡 银行卡 銀行卡 借记卡 储蓄卡 卡号 卡號 刷卡 カード クレジット 金融卡 簽帳卡",
    "phone": """전화 연락처 휴대폰 휴대전화 핸드폰 폰번호 팩스 문자 연락 문의 통화 콜 전번
        电话 電話 手机 手機 联系 聯絡 聯繫 传真 傳真 拨打 撥打 致电 致電 来电 來電 号码是 座机 微信 短信 簡訊 热线 热線 市話
        携帯 連絡先 ファックス ファクス 連絡 お電話 番号まで""",
    "kr_rrn": "주민등록 주민번호 주민등록번호 외국인등록 외국인번호 주민 身分登録 住民登録 居民登录 居民登錄",
    "cn_id": "身份证 身份證 身分证 公民身份 证件号 證件號 居民身份 신분증 身分証",
    "tw_id": "身分證 身份證字號 統一證號 居留證 居留证",
    "us_ssn": "사회보장번호 사회보장 社会安全 社會安全 社会保障番号 社安号 ソーシャルセキュリティ",
    "iban": "국제계좌 国际银行账号",
    "ip": "아이피 접속지 주소지 접속 地址 登录 登錄 IP地址 接続元 アクセス アドレス",
    "secret": "API키 API\\s키 APIキー APIトークン API密钥 API密鑰 비밀번호 암호 토큰 인증키 비밀키 密码 密碼 密钥 密鑰 令牌 口令 パスワード トークン 秘密鍵 暗証",
}


def _pattern() -> re.Pattern[str]:
    groups = []
    for label in _LATIN:
        words = "|".join(sorted(_OTHER_SCRIPTS[label].split(), key=len, reverse=True))
        groups.append(rf"(?P<{label}>(?<![A-Za-z])(?:{_LATIN[label]})(?![A-Za-z])|{words})")
    return re.compile("|".join(groups), re.VERBOSE | re.IGNORECASE)


_LABEL = _pattern()
# A period ends a sentence unless it shortens a word ("no. 5").
_BREAK = re.compile(
    r"[0-9,，、!?！？。;；\n]|(?<!no)(?<!nr)(?<!num)(?<!tel)(?<!ref)(?<!acct)(?<!art)(?<!ver)(?<!txn)\.\s",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"[\s\"')\]}」』】）]*(?:번|号|號|番|는|은|이|가|の|という|(?:is|as)\s(?:the|my|your|an?|our)|\(|（|是|为|為|を|に|から|まで|에서|으로|로)?[\s(（]*"
)


def before(text: str, start: int, gap: re.Pattern[str] | None = None, reach: int = 32) -> Label | None:
    """The label that stands before ``text[start:]``; None where there is none.

    What is between must be all of ``gap``, or where that is not given hold no number, comma or end of a sentence.
    """
    window = text[max(0, start - reach) : start]
    found: Label | None = None
    place = 0
    for match in _LABEL.finditer(window):
        found, place = match.lastgroup, match.end()  # type: ignore[assignment]  # the groups are the labels
    apart = not gap.fullmatch(window, place) if gap else _BREAK.search(window, place)
    return None if found is None or apart else found


def after(text: str, end: int, reach: int = 24) -> Label | None:
    """The label that follows right after ``text[:end]``: "4111… is my card", "…123번 주문"."""
    window = text[end : end + reach]
    filler = _AFTER.match(window)
    match = _LABEL.match(window, filler.end() if filler else 0)
    return match.lastgroup if match else None  # type: ignore[return-value]


_RUN_BEFORE = re.compile(r"(?:[0-9A-Za-z]*[0-9][0-9A-Za-z]*) $")
_RUN_AFTER = re.compile(r" (?:[A-Za-z]*[0-9][0-9A-Za-z]*)")


def in_longer_run(text: str, start: int, end: int) -> bool:
    """Whether ``text[start:end]``, grouped by spaces, goes on in groups of three or more: part of an IBAN, a longer code."""
    if " " not in text[start:end].strip():
        return False
    before, behind = _RUN_BEFORE.search(text, max(0, start - 12), start), _RUN_AFTER.match(text, end)
    return any(run is not None and len(run[0]) > 3 for run in (before, behind))


_OPERATOR_BEFORE = re.compile(r"(?:[*^×÷]|[0-9)]\s?=|[0-9a-z)]\s?\+)\s?$")
_OPERATOR_AFTER = re.compile(r"\s?(?:[*^×÷%]|[+/=]\s?[0-9(])")


def in_arithmetic(text: str, start: int, end: int) -> bool:
    """Whether the bare number ``text[start:end]`` is one of a calculation."""
    return text[start:end].isdigit() and bool(
        _OPERATOR_BEFORE.search(text[max(0, start - 4) : start]) or _OPERATOR_AFTER.match(text, end)
    )


def of(text: str, start: int, end: int) -> Label | None:
    """The label of ``text[start:end]``: the one before it, else the one right after it."""
    return before(text, start) or after(text, end)
