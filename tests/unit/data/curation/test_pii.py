"""Personal data that must go, and look-alikes that must stay."""

import pytest

from stages.data.curation.pii import scrub
from stages.data.curation.pii_numbers import iban_valid, luhn_valid


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mail jane.doe@example.com now", "EMAIL"),
        ("Bitte an max_mustermann+spam@uni-bonn.de schreiben", "EMAIL"),
        ("the last login came from 93.184.216.34", "IPV4"),
        ("the server 8.8.8.8 answers", "IPV4"),
        ("http://9.9.9.9:8080/x", "IPV4"),
        ("resolve 2001:4860:4860::8888 first", "IPV6"),
        ("call +1 650-253-0000 today", "PHONE"),
        ("call (212) 736-5000 today", "PHONE"),
        ("ring +44 20 7946 0958 today", "PHONE"),
        ("card 4111 1111 1111 1111", "CREDIT_CARD"),
        ("card 378282246310005", "CREDIT_CARD"),
        ("to GB82 WEST 1234 5698 7654 32 please", "IBAN"),
        ("to DE89370400440532013000 please", "IBAN"),
        ("SSN 123-45-6789", "SSN"),
        ("my ssn: SSN 123 45 6789", "SSN"),
        ("Author: <_@lvh.cc>", "EMAIL"),
        ("<jane at example.org>", "EMAIL"),
        ("jane [at] example [dot] org", "EMAIL"),
        ("mailto:JANE.DOE@EXAMPLE.DE", "EMAIL"),
        ("müller＠bücher.photography", "EMAIL"),
        ("Phone: 0490 75 40 81", "PHONE"),
        ("reach 001-650-253-0000x12 today", "PHONE"),
        ("please call me at 6502530000", "PHONE"),
        ("781 1704 office", "PHONE"),
        ("Maestro card 501800000009", "CREDIT_CARD"),
        ("card 180000000000002", "CREDIT_CARD"),
    ],
)
def test_personal_data_becomes_its_placeholder(text: str, kind: str) -> None:
    result = scrub(text)
    assert result.counts == {kind: 1}
    around = result.text.replace(f"<{kind}>", "").replace(":8080", "")
    assert around != text
    assert "@" not in around
    assert not any(character.isdigit() for character in around)


@pytest.mark.parametrize(
    "text",
    [
        "git clone git@github.com:owner/repository.git",
        "y = x@w.T + self.a@self.weight",
        "version 1.2.3.4 and v10.20.30.40, since 1.8.0.1, pkg==1.2.3.4",
        "127.0.0.1 192.168.1.77 10.1.2.3 0.0.0.0 255.255.255.0 192.0.2.44",
        "a[1::2], b[::2], std::vector, 12:30:45, fe80::1:2:3",
        "array([4.1111111111111111, 0.378282246310005])",
        "1234 5678 9012 3456",
        "DE88370400440532013000",
        "000-12-3456 666-12-3456 123-00-4567 2024-01-0200",
        "shape (200, 300, 4000), 200 300 4000, 123-456-7890",
        "torch-2.1.0.1-cp311.whl",
        "part 123-45-6789, order #123-45-6789",
        "``3.3.1``, ``3.3.5`` and ``3.3.9.45``",
        "https://example.com/item/41111111111111111?id=4111111111111111",
        "grad@weight.data, x@w.to(device), icon@2x.png, @app.route",
        "01.02.2024 10:30, 2003 - 2019, 1987-1991, 02/03/2024",
        'ids 449557044 and 6502530000, "home":538809116',
        "01 02 03 04 05 06 07 08",
        "ssh://git@host.org/x and https://user:password@host.org",
        "password = os.environ['DB_PASSWORD'], token = next_token, api_key='your-api-key-here1'",
        "commit 7921be1537eac1e97bc40179a57f0349c2aee67d",
        "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    ],
)
def test_look_alikes_in_software_docs_stay(text: str) -> None:
    assert scrub(text).text == text


def test_scrubbing_twice_changes_nothing_more() -> None:
    once = scrub("a.b@example.org, +49 30 901820, DE89370400440532013000, 52.95.110.1").text
    assert scrub(once).text == once
    assert once == "<EMAIL>, <PHONE>, <IBAN>, <IPV4>"


def test_check_digits_by_hand() -> None:
    # 79927398713: doubled every second from the right 7 9+9.. sums to 70
    assert luhn_valid("79927398713")
    assert not luhn_valid("79927398714")
    # GB82WEST12345698765432 -> 3214282912345698765432161182 mod 97 = 1
    assert 3214282912345698765432161182 % 97 == 1
    assert iban_valid("GB82 WEST 1234 5698 7654 32")
    assert not iban_valid("GB83 WEST 1234 5698 7654 32")
