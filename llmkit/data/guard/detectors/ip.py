"""Public IP addresses. A private, reserved or documentation address names nobody outside its own network."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from llmkit.data.guard.detectors import labels
from llmkit.data.guard.detectors.base import Match

_V4 = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9][.\-+~])(?<![A-Za-z][.\-/+~])(?<![<>=~^]=)[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z_]|[.\-+][0-9A-Za-z])"
)
_V6 = re.compile(
    r"(?<![0-9A-Za-z:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f:]{1,33}[0-9A-Fa-f]|:)(?![0-9A-Za-z]|:[0-9A-Fa-f])"
)
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24"
    " 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4"
    " 2001::/32 2001:2::/48 2001:10::/28 2001:20::/28 2001:db8::/32 2002::/16 3fff::/20".split()
]
# Name servers for everybody, which texts about networks are full of.
_RESOLVERS = frozenset(
    "1.1.1.1 1.0.0.1 8.8.8.8 8.8.4.4 9.9.9.9 149.112.112.112 208.67.222.222 208.67.220.220 94.140.14.14 94.140.15.15"
    " 168.126.63.1 168.126.63.2 164.124.101.2 114.114.114.114 114.114.115.115 223.5.5.5 223.6.6.6 119.29.29.29 101.101.101.101"
    " 168.95.1.1 168.95.192.1 2001:4860:4860::8888 2001:4860:4860::8844 2606:4700:4700::1111 2606:4700:4700::1001".split()
)
# Numbers on both sides, with points in one of them at least: the outline of a picture.
_NUMBER_BEFORE, _NUMBER_AFTER = (
    re.compile(r"[ \-a-z][0-9]*\.?[0-9]+ $"),
    re.compile(r" -?\.?[0-9]+(?:\.[0-9]+){0,2}[ \-a-z]"),
)
_SMALL = 32  # all four numbers below: a version or a section unless a label says address (one public address in 4,000)


def find(text: str) -> Iterator[Match]:
    """IPv4 and IPv6 addresses of the public internet.

    Not: versions, numbers of sections, object identifiers (1.3.6.1), network addresses (x.y.0.0), rows of numbers.
    """
    for match in _V4.finditer(text):
        address = _public(match[0])
        if address is not None and _not_a_version(text, match):
            yield Match(match.start(), match.end(), address)
    for match in _V6.finditer(text):
        address = _public(match[0])
        if address is not None:
            yield Match(match.start(), match.end(), address)


def _public(text: str) -> str | None:
    """The address in its one canonical form if it is one of the public internet."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if str(address) in _RESOLVERS or any(address in network for network in _NOT_PUBLIC):
        return None
    return str(address)


def _not_a_version(text: str, match: re.Match[str]) -> bool:
    label = labels.of(text, *match.span())
    if label == "ip":
        return True
    octets = [int(part) for part in match[0].split(".")]
    if label == "other" or max(octets) < _SMALL or not any(octets[2:]) or (octets[0] < 3 and octets[1] < 40):
        return False
    beside = text[max(0, match.start() - 16) : match.start()], text[match.end() : match.end() + 16]
    return not (_NUMBER_BEFORE.search(beside[0]) and _NUMBER_AFTER.match(beside[1]))
