"""E-mail addresses (RFC 5321 as people write it), with particles and Chinese text stuck to them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmkit.data.guard.detectors.base import Match

_SPELLED_DOT = r"\s?[(\[{]\s?(?:dot|DOT|점)\s?[)\]}]\s?"
_ADDRESS = re.compile(
    r"(?<![A-Za-z0-9._%+\-])"
    rf"(?P<local>(?:[A-Za-z0-9_+\-]{{1,32}}{_SPELLED_DOT}){{0,3}}"
    r"(?:[A-Za-z0-9_][A-Za-z0-9._%+\-']{0,62}[A-Za-z0-9_+\-]|[A-Za-z0-9_]))"
    r"(?:@|\s?[(\[{<]\s?(?:at|AT|@|골뱅이)\s?[)\]}>]\s?|\s골뱅이\s)"
    rf"(?P<domain>(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{{0,61}}[A-Za-z0-9])?(?:\.|{_SPELLED_DOT})){{1,5}}"
    r"(?P<tld>xn--[A-Za-z0-9\-]{2,59}|[A-Za-z]{2,24}))"
    r"(?![A-Za-z0-9_@]|-[A-Za-z0-9])"
)
_DOT = re.compile(_SPELLED_DOT)
# Names that RFC 2606 and RFC 6761 keep for examples belong to nobody.
_RESERVED = re.compile(r"(?i)(?:^|\.)(?:example\.(?:com|net|org)|example|test|invalid|localhost)$")
# "logo@2x.png" is a picture for fine screens; none of these is a top-level domain.
_FILES = frozenset(
    "png jpg jpeg gif webp svg bmp ico css js mjs ts tsx jsx json html htm xml yaml yml toml txt csv pdf exe dll jar war".split()
)
# Two-letter top-level domains are countries (ISO 3166, plus ac, eu, su, tp, uk).
_COUNTRIES = frozenset(
    "ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bv bw by bz ca cc cd cf cg"
    " ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo fr ga gd ge gf gg gh gi gl"
    " gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je jm jo jp ke kg kh ki km kn kp kr kw ky kz"
    " la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na nc ne nf ng ni nl no"
    " np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw py qa re ro rs ru rw sa sb sc sd se sg sh si sj sk sl sm sn so sr ss"
    " st su sv sx sy sz tc td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm"
    " zw".split()
)
_USERINFO = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s/]*$")


def find(text: str) -> Iterator[Match]:
    """Addresses with a domain that can exist. Not: example.com and its like, ``git@host:path``, the user of a URI."""
    for match in _ADDRESS.finditer(text):
        domain = _DOT.sub(".", match["domain"]).lower()
        if _is_address(text, match, domain):
            local = _DOT.sub(".", match["local"]).lower()
            yield Match(match.start(), match.end(), f"{local}@{domain}")


def _is_address(text: str, match: re.Match[str], domain: str) -> bool:
    tld = match["tld"].lower()
    if tld in _FILES or (len(tld) == 2 and tld not in _COUNTRIES) or _RESERVED.search(domain):
        return False
    if ".." in match["local"] or _USERINFO.search(text, max(0, match.start() - 120), match.start()):
        return False
    return not (match["local"] == "git" and text[match.end() : match.end() + 1] == ":")
