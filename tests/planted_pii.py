"""Invented personal data and secrets of many forms and countries, made from a seed and planted into given lines.

Nothing here is a constant that looks like a secret: tokens are put together from their prefix and random characters.
"""

import random
import string
from collections.abc import Callable
from typing import NamedTuple

import phonenumbers

from stages.data.curation.pii_numbers import luhn_valid

ALPHANUMERIC = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


class Sample(NamedTuple):
    """A value that must go, and the line that it stands in."""

    kind: str
    value: str
    line: str


def _draw(rng: random.Random, length: int, alphabet: str = ALPHANUMERIC) -> str:
    return "".join(rng.choices(alphabet, k=length))


def _digits(rng: random.Random, length: int) -> str:
    return _draw(rng, length, string.digits)


def email(rng: random.Random) -> Sample:
    user = rng.choice(("jane.doe", "max_m", "o.neill+list", "li", "JÜRGEN.müller", "A.Smith")) + _digits(rng, 2)
    host = rng.choice(("example.com", "uni-bonn.de", "bücher.de", "firma.photography", "POST.EXAMPLE.ORG", "a.co.uk"))
    at = rng.choice("@@@＠")
    value = f"{user}{at}{host}"
    shape = rng.choice(("Write to {} soon.", "mailto:{}", "E-mail:{}", "<{}>", '{{"from": "{}"}}', "({})."))
    return Sample("EMAIL", value, shape.format(value))


def phone(rng: random.Random) -> Sample:
    region = rng.choice(("US", "GB", "DE", "FR", "BE", "NL", "IT", "ES", "AU", "IN", "JP", "BR", "SE", "CH", "PL"))
    kind = rng.choice((phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE))
    start = phonenumbers.example_number_for_type(region, kind)
    assert start is not None
    assert start.national_number is not None
    number = phonenumbers.PhoneNumber(start.country_code, start.national_number // 1000 * 1000 + rng.randrange(1000))
    number.italian_leading_zero = start.italian_leading_zero
    styles = phonenumbers.PhoneNumberFormat
    style = rng.choice((styles.INTERNATIONAL, styles.NATIONAL, styles.NATIONAL, styles.E164))
    value = phonenumbers.format_number(number, style)
    if region == "US":
        value = rng.choice((value, f"001-{_us(rng)}", f"{_us(rng)}x{_digits(rng, 3)}", _us(rng).replace("-", "")))
    shape = rng.choice(("Call me at {}.", "Phone: {}", "Tel. {}", "My mobile number is {}", "{} (mobile)", "Fax: {}"))
    return Sample("PHONE", value, shape.format(value))


def _us(rng: random.Random) -> str:
    return f"{rng.choice((212, 650, 512, 303))}-{rng.randrange(220, 999)}-{_digits(rng, 4)}"


def card(rng: random.Random) -> Sample:
    first, length = rng.choice(
        (
            *(
                ("4", 16),
                ("4", 13),
                ("4", 19),
                ("53", 16),
                ("2221", 16),
                ("37", 15),
                ("300", 14),
                ("36", 14),
                ("38", 14),
            ),
            *(("6011", 16), ("3530", 16), ("1800", 15), ("2131", 15), ("5018", 12), ("6759", 16), ("62", 16)),
        )
    )
    body = first + _digits(rng, length - len(first) - 1)
    value = body + next(digit for digit in string.digits if luhn_valid(body + digit))
    if length == 16 and rng.random() < 0.5:
        value = rng.choice(" -").join(value[start : start + 4] for start in range(0, 16, 4))
    shape = rng.choice(
        ("My credit card is {}.", "Card number: {}", "She paid with {} (Maestro)", "charge card {} today")
    )
    return Sample("CREDIT_CARD", value, shape.format(value))


def iban(rng: random.Random) -> Sample:
    country, bank, length = rng.choice(
        (("DE", "", 22), ("GB", "WEST", 22), ("FR", "", 27), ("NO", "", 15), ("MT", "MALT", 31))
    )
    account = bank + _digits(rng, length - 4 - len(bank))
    check = 98 - int("".join(str(int(character, 36)) for character in f"{account}{country}00")) % 97
    value = f"{country}{check:02d}{account}"
    if rng.random() < 0.5:
        value = " ".join(value[start : start + 4] for start in range(0, length, 4))
    return Sample("IBAN", value, rng.choice(("Pay to {}.", "IBAN: {}", "PAY {} TODAY")).format(value))


def ssn(rng: random.Random) -> Sample:
    value = f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"
    shape = rng.choice(("SSN {}", "His social security number is {}.", "The applicant gave {} on the form."))
    return Sample("SSN", value, shape.format(value))


def ipv4(rng: random.Random) -> Sample:
    value = f"{rng.choice((52, 93, 151, 188))}.{rng.randint(100, 250)}.{rng.randint(1, 254)}.{rng.randint(1, 254)}"
    return Sample("IPV4", value, rng.choice(("login from {}", "http://{}:8080/x", "[{}]")).format(value))


def ipv6(rng: random.Random) -> Sample:
    value = "2a00:" + ":".join(f"{rng.randint(4096, 65535):x}" for _ in range(7))
    return Sample("IPV6", value, rng.choice(("login from {}", "http://[{}]/x", "resolve {} first")).format(value))


def login(rng: random.Random) -> Sample:
    value = f"{rng.choice(('anna', 'admin', 'app_user'))}:{_draw(rng, 12)}"
    scheme = rng.choice(("https", "postgresql", "ftp", "mongodb+srv", "redis"))
    return Sample("LOGIN", value, f"url = {scheme}://{value}@db.example.net:5432/rows")


def secret(rng: random.Random) -> Sample:
    jwt = ".".join(("eyJ" + _draw(rng, 20), "eyJ" + _draw(rng, 40), _draw(rng, 43)))
    known = ("AKIA" + _draw(rng, 16, string.ascii_uppercase + string.digits), "ghp_" + _draw(rng, 36), jwt)
    known += ("glpat-" + _draw(rng, 20), "xoxb-" + f"{_digits(rng, 12)}-{_digits(rng, 12)}-{_draw(rng, 24)}")
    known += ("sk_live_" + _draw(rng, 24), "AIza" + _draw(rng, 35), "hf_" + _draw(rng, 34), "npm_" + _draw(rng, 36))
    known += ("SG." + f"{_draw(rng, 22)}.{_draw(rng, 43)}", "SK" + _draw(rng, 32, HEX), _draw(rng, 32, HEX) + "-us12")
    known += (f"{_digits(rng, 9)}:AA{_draw(rng, 33)}", "sk-" + _draw(rng, 48), "dapi" + _draw(rng, 32, HEX))
    value = rng.choice((*known, *(_draw(rng, rng.randint(16, 40)) for _ in range(6))))
    if value in known:
        return Sample("SECRET", value, rng.choice(("use {} there", 'key = "{}"', "curl -H 'X-Key: {}'")).format(value))
    shape = rng.choice(('password = "{}"', "DB_PASSWORD={}", "api_key: '{}'", "Authorization: Bearer {}"))
    return Sample("SECRET", value, shape.format(value))


def private_key(rng: random.Random) -> Sample:
    name = rng.choice(("RSA ", "EC ", "OPENSSH ", "ENCRYPTED ", ""))
    lines = "\n".join(_draw(rng, 64, ALPHANUMERIC + "+/") for _ in range(rng.randint(2, 24)))
    value = f"-----BEGIN {name}PRIVATE KEY-----\n{lines}\n-----END {name}PRIVATE KEY-----"
    return Sample("PRIVATE_KEY", value, value)


MAKERS: tuple[Callable[[random.Random], Sample], ...] = (
    email, phone, card, iban, ssn, ipv4, ipv6, login, secret, private_key,
)  # fmt: skip
