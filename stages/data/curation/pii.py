"""Personal data out of text: patterns plus check digits, one placeholder per type, counted.

Tuned against what looks like personal data in software docs and is not: versions (1.2.3.4), git@host:path,
matrix products (x@w.T), private and documentation addresses, slices (a[1::2]), tables of numbers.
Names of persons and postal addresses are not found: that takes a model.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import phonenumbers


@dataclass(frozen=True)
class Scrubbed:
    """A text without personal data, and how many of each type were replaced."""

    text: str
    counts: Counter[str]


_GENERIC_DOMAINS = frozenset(
    {"com", "org", "net", "edu", "gov", "mil", "int", "info", "biz", "name", "pro", "dev", "app", "cloud", "tech"}
    | {"online", "site", "xyz", "science", "email"}
)
_COUNTRIES = frozenset(region.lower() for region in phonenumbers.SUPPORTED_REGIONS) | {"uk", "eu", "io", "ai"}

_EMAIL = re.compile(
    r"(?<![\w.+%/@:-])([A-Za-z0-9][A-Za-z0-9._%+-]{1,63})@((?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+)"
    r"([A-Za-z]{2,24})(?![\w@-]|\.\w|:[\w~/])"
)
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:|::)(?:[0-9A-Fa-f]{1,4}|:){2,15}(?![\w:])")
_CARD = re.compile(r"(?<![\w.,-])\d{4}(?:(?:[ -]\d{4}){3}|[ -]\d{6}[ -]\d{5}|\d{9,15})(?![\w-]|[.,]\d)")
_IBAN = re.compile(r"(?<![\w-])[A-Z]{2}\d{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)(?![\w-])")
_SSN = re.compile(r"(?<![\w.-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)")
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .-]?\(?\d{1,5}\)?){2,6}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}-\d{4}|\d{3}\.\d{3}\.\d{4})(?![\w-]|\.\d)"
)
_CARD_PREFIX = re.compile(r"4|5[1-5]|2[2-7]|3[47]|36|30[0-5]|6011|65|35")
_VERSION_BEFORE = re.compile(
    r"(?:\bversions?|\bver\.?|\brelease[ds]?|\bv|[=<>~!]=|\bsince|\badded in|\w-)\s*[:=]?\s*$", re.I
)
_ADDRESS_BEFORE = re.compile(
    r"(?:\bip\b|address|host|server|client|\bfrom\b|\bdns\b|ping|://|@|peer|remote)[^.\n]{0,24}$", re.I
)


def luhn_valid(digits: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1)."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + position % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def iban_valid(iban: str) -> bool:
    """The check digits of an IBAN (ISO 7064, mod 97)."""
    compact = iban.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


def _is_email(match: re.Match[str]) -> bool:
    domain = match[3]
    if match[1] == "git":
        return False
    return domain.lower() in _GENERIC_DOMAINS or (domain.islower() and len(domain) == 2 and domain in _COUNTRIES)


def _is_card(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    return bool(_CARD_PREFIX.match(digits)) and len(set(digits)) > 1 and luhn_valid(digits)


def _is_phone(match: re.Match[str]) -> bool:
    try:
        number = phonenumbers.parse(match[0], None if match[0].startswith("+") else "US")
    except phonenumbers.NumberParseException:
        return False
    return phonenumbers.is_valid_number(number)


def _is_ipv4(match: re.Match[str]) -> bool:
    """A global address; four small numbers count only where the words before say that they are an address."""
    octets = match[0].split(".")
    if any((len(octet) > 1 and octet[0] == "0") or int(octet) > 255 for octet in octets):
        return False
    address = ip_address(match[0])
    if not isinstance(address, IPv4Address) or not address.is_global:
        return False
    before = match.string[max(0, match.start() - 32) : match.start()]
    if _VERSION_BEFORE.search(before):
        return False
    if all(int(octet) < 40 for octet in octets):
        after = match.string[match.end() : match.end() + 2]
        return bool(_ADDRESS_BEFORE.search(before) or re.match(r"[:/]\d", after))
    return True


def _is_ipv6(match: re.Match[str]) -> bool:
    if sum(1 for part in match[0].split(":") if part) < 3:
        return False
    try:
        address = ip_address(match[0])
    except ValueError:
        return False
    return isinstance(address, IPv6Address) and address.is_global


_RULES: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], bool]], ...] = (
    ("EMAIL", _EMAIL, _is_email),
    ("IBAN", _IBAN, lambda match: iban_valid(match[0])),
    ("CREDIT_CARD", _CARD, _is_card),
    ("SSN", _SSN, lambda match: True),
    ("PHONE", _PHONE, _is_phone),
    ("IPV6", _IPV6, _is_ipv6),
    ("IPV4", _IPV4, _is_ipv4),
)


def scrub(text: str) -> Scrubbed:
    """Replace personal data by placeholders such as <EMAIL>; the same text always gives the same result."""
    counts: Counter[str] = Counter()
    for name, pattern, is_real in _RULES:
        if name == "EMAIL" and "@" not in text:
            continue

        def replace(match: re.Match[str], name: str = name, is_real: Callable[..., bool] = is_real) -> str:
            if not is_real(match):
                return match[0]
            counts[name] += 1
            return f"<{name}>"

        text = pattern.sub(replace, text)
    return Scrubbed(text, counts)
