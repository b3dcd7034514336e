"""Payment cards, IBANs and US social security numbers: their shape, their check digits, and the words around them."""

import re
from collections.abc import Iterator

from stages.data.curation.pii_spans import Found, before, inside_url

# No digit, part of a name, fraction or key may touch the number. The first digit comes before the look behind, because
# the search for a digit is fast and the search for "no word in front" is not.
_CARD = re.compile(
    r"[0-9](?<![\w.,/=#-][0-9])[0-9]{3}"
    r"(?:[0-9]{8,15}|(?:[ -][0-9]{4}){2}(?:[ -][0-9]{4}(?:[ -][0-9]{1,4})?)?|[ -][0-9]{6}[ -][0-9]{4,5})"
    r"(?![\w-]|[.,/][0-9])"
)
# First digits and lengths of the card schemes: ISO/IEC 7812 and the schemes' own ranges.
_SCHEMES: tuple[tuple[re.Pattern[str], frozenset[int]], ...] = tuple(
    (re.compile(first), frozenset(lengths))
    for first, lengths in (
        (r"4", (13, 16, 19)),  # Visa
        (r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),  # Mastercard
        (r"3[47]", (15,)),  # American Express
        (r"30[0-59]|36|3[89]", (14, 16, 19)),  # Diners Club
        (r"6011|64[4-9]|65", (16, 19)),  # Discover
        (r"35", (16, 17, 18, 19)),  # JCB
        (r"1800|2131", (15,)),  # JCB, the older ones
        (r"62", (16, 17, 18, 19)),  # UnionPay
        (r"50|5[6-8]|63|67|0604", (12, 13, 14, 15, 16, 17, 18, 19)),  # Maestro
        (r"220[0-4]", (16, 17, 18, 19)),  # Mir
    )
)
# Without a word about a card, lengths that ids often have are ids: check digits let one in ten pass.
_PLAIN_LENGTHS = frozenset({14, 15, 16})
_CARD_NEAR = re.compile(
    r"\bcards?\b|credit|debit|\bvisa\b|master ?card|maestro|\bamex\b|american express|diners|discover|\bjcb\b|unionpay"
    r"|\bcc\b|\bpan\b|carte|karte|tarjeta|carta\b|cartão|kaart|payment|\bpaid\b|\bpay\b|charged?\b|billing",
    re.I,
)

_IBAN = re.compile(r"[A-Z](?<![\w-][A-Z])[A-Z][0-9]{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)")
_IBAN_SAID = re.compile(r"[Ii](?:BAN|ban)\b[^0-9\n]{0,16}?\b([a-z]{2}[0-9]{2}[a-z0-9]{11,30})(?![\w-])")
# Lengths by country: ISO 13616, the IBAN registry.
_IBAN_LENGTHS: dict[str, int] = {
    name: length
    for length, names in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR", 27: "FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU",
        31: "MT SC", 32: "LC",
    }.items()
    for name in names.split()
}  # fmt: skip

_SSN = re.compile(r"[0-9](?<![\w.-][0-9])[0-9]{2}-[0-9]{2}-[0-9]{4}(?![\w-]|\.[0-9])")
_SSN_WORD = re.compile(r"S(?:SN|ocial [Ss]ecurity|OCIAL SECURITY)|social security")
_SSN_SAID = re.compile(r"[^0-9\n]{0,32}?([0-9]{3}[ -]?[0-9]{2}[ -]?[0-9]{4})(?![\w-]|\.[0-9])")
_SSN_NAMED = re.compile(r"\bssns?\b|social|security|taxpayer|\btin\b", re.I)
_PART_BEFORE = re.compile(
    r"(?:\b(?:part|parts|item|model|order|serial|sku|catalog(?:ue)?|stock|invoice|ref(?:erence)?|isbn|lot|batch|case|ticket"
    r"|article|product|cas|p/n|s/n|version)\b[.:#]?|#)(?:\s*(?:number|no|nr|id|code|is|was)\b[.:]?)*"
    r"[\s:#=(]*$",
    re.I,
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


def find_cards(text: str) -> Iterator[Found]:
    """Numbers of a scheme's length with a right check digit; outside of URLs, where such numbers are ids."""
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        lengths = _lengths_of(digits)
        if len(digits) not in lengths or len(set(digits)) == 1 or not luhn_valid(digits):
            continue
        if inside_url(text, match.start()):
            continue
        is_plain = len(digits) in _PLAIN_LENGTHS or len(digits) != len(match[0])
        # Maestro takes any length, so its numbers are the easiest to hit by chance.
        if (is_plain and len(lengths) < 8) or _card_near(text, match):
            yield Found(*match.span(), "CREDIT_CARD")


def _lengths_of(digits: str) -> frozenset[int]:
    for first, lengths in _SCHEMES:
        if first.match(digits):
            return lengths
    return frozenset()


def _card_near(text: str, match: re.Match[str]) -> bool:
    return bool(
        _CARD_NEAR.search(before(text, match.start(), 80)) or _CARD_NEAR.search(text, match.end(), match.end() + 40)
    )


def find_ibans(text: str) -> Iterator[Found]:
    """Account numbers with right check digits; a word in capitals after one is no part of it."""
    for match in _IBAN.finditer(text):
        end = _iban_end(match)
        if not re.match(r"[\w-]", text[end : end + 1]) and iban_valid(text[match.start() : end]):
            yield Found(match.start(), end, "IBAN")
    for match in _IBAN_SAID.finditer(text):
        if iban_valid(match[1]):
            yield Found(*match.span(1), "IBAN")


def _iban_end(match: re.Match[str]) -> int:
    """Where the number of characters that its country prescribes is reached; all of it for other countries."""
    length, seen = _IBAN_LENGTHS.get(match[0][:2]), 0
    for place, character in enumerate(match[0]):
        seen += character != " "
        if seen == length:
            return match.start() + place + 1
    return match.end()


def find_social_security_numbers(text: str) -> Iterator[Found]:
    """US numbers by their hyphens, unless they are said to be a part; with other spacing where they are named."""
    for match in _SSN.finditer(text):
        front = before(text, match.start(), 40)
        if _is_issued(match[0]) and (_SSN_NAMED.search(front) or not _PART_BEFORE.search(front)):
            yield Found(*match.span(), "SSN")
    for word in _SSN_WORD.finditer(text):
        if (match := _SSN_SAID.match(text, word.end())) and _is_issued(match[1]):
            yield Found(*match.span(1), "SSN")


def _is_issued(number: str) -> bool:
    """No group is all zeros, and 666 and 9xx are never given out."""
    digits = re.sub(r"\D", "", number)
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"
