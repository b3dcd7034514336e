"""Phone numbers: international ones by their country code, national ones by grouping and the words around them.

A number without country code looks like any other number, so the less its form says, the more its context must:

- `+49 ...` and `001-...` count where the country's number plan allows them;
- US formats (`(212) 736-5000`, `212-736-5000`, `212.736.5000`) and groups after a leading zero (`0490 75 40 81`), where
  the plan of a country also groups them so;
- anything that some country allows after words such as "call me at" or before "(mobile)";
- any seven digits directly after a label such as `Tel.:`.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

import phonenumbers

from stages.data.curation.pii_spans import Found, before, inside_url

_GAP = r"[ \u00a0\u2009]"
_SEPARATOR = rf"(?:{_GAP}[-/\u2010-\u2013]{_GAP}|[-./\u2010-\u2013]|{_GAP})"
_GROUPS = rf"(?:{_SEPARATOR}?\([0-9]{{1,5}}\)|{_SEPARATOR}[0-9]{{1,11}}|(?<=\))[0-9]{{1,11}}){{0,7}}"
# The first character comes before the look behind: the search for a plus, a bracket or a digit is fast.
_CANDIDATE = re.compile(
    r"[+(0-9](?<![\w.,+$€£/\\=#&%@(-][+(0-9])(?=(?:[^0-9\n]{0,4}[0-9]){6})"
    rf"(?:(?<=\+) ?\(?[0-9]{{1,15}}\)?|(?<=\()\+?[0-9]{{1,5}}\)|(?<=[0-9])[0-9]{{0,14}}){_GROUPS}"
)
_EXTENSION = re.compile(r"[ ,;]{0,2}(?:x|ext(?:ension|n)?\.?:?|Ext\.?:?|Durchwahl|Dw\.|poste|#) ?[0-9]{1,6}(?![\w-])")
_AFTER = re.compile(r"[A-Za-z0-9_]|-\w|\.[0-9]|[%°€$£]")
_GROUP = re.compile(r"[0-9]+")
_SEPARATORS = re.compile(r"[^0-9+]+")

_LABEL = re.compile(
    r"(?:\b(?:tel|telephone|phone|mobile|mob|fax|telefax|telefon|tél|téléphone|teléfono|telefono|telefone|telefoon|handy"
    r"|mobil|móvil|celular|cellulare|portable|gsm|whatsapp|hotline|cell ?phone|landline|телефон|тел|電話|电话)"
    r"(?: ?(?:number|no|nr|num|numéro|nummer|número)\b)?(?: ?\([a-z]{1,8}\))?(?:/(?:fax|mobile|tel))?"
    r"[.:#]{0,2}(?: is| was| lautet| est| es)?|☎|📞)[:\s\"'\]】)]{0,4}\(?\Z",
    re.I,
)
_CONTEXT = re.compile(
    r"(?:\b(?:tel|phone|telephone|mobile|fax|telefon|téléphone|tél|teléfono|telefono|telefone|telefoon|handy|mobil|móvil"
    r"|celular|cellulare|gsm|whatsapp|signal|hotline|landline|voicemail|sms|phone number|contact number"
    r"|call(?:ed|ing)?(?: (?:me|us|him|her|them|back|you|the \w+|my \w+|our \w+))?(?: back| again)?(?: on| at)?"
    r"|dial|ring|reach(?:ed|able)?|text(?:ed)? (?:me|us|him|her|them)|answering|messages? to|contact|my registered"
    r"|anrufen|rufen|erreichbar|erreichen|rufnummer|appele[rz]|joindre|llam[ae]\w*|chiam[ai]\w*|ligue)\b[^0-9\n+]{0,24}"
    r"|\b(?:desk|office|work|home|main|direct|cell|toll[- ]free|switchboard)(?: (?:number|no\.?|line))?: {0,2})\Z",
    re.I,
)
_LABEL_AFTER = re.compile(r"[\s,\\-]{0,3}\(?(?:office|fax|mobile|home|work|cell|desk|mob|direct|landline)\b", re.I)
_NOT_DIALLED = re.compile(
    r"(?:\bid\b|isbn|issn|\bdoi\b|serial|version|order|invoice|account|\bpmid\b|\brfc\b)[^\n]{0,16}\Z", re.I
)
_NANP = re.compile(
    r"(?:1[-. ])?(?:\([2-9][0-9]{2}\)[ -]?[2-9][0-9]{2}[-. ]|([2-9][0-9]{2})([-.])[2-9][0-9]{2}\2)[0-9]{4}"
)
_LOCAL = re.compile(r"[2-9][0-9]{2}[-. ][0-9]{4}")
_DATE = re.compile(
    r"[0-9]{1,2}([-./ ])[0-9]{1,2}\1[0-9]{4}|[0-9]{4}([-./ ])[0-9]{1,2}\2[0-9]{1,2}|[12][0-9]{3} ?[-/–] ?[12][0-9]{3}"
)
_NUMBER_BEFORE = re.compile(r"[0-9][ \t]{1,3}\Z")
_NUMBER_AFTER = re.compile(r"[ \t]{1,3}[0-9]{2}")

# Whose plan a number without country code may follow: the countries from which most text comes.
_REGIONS = (
    "US", "GB", "DE", "FR", "IT", "ES", "NL", "BE", "AT", "CH", "SE", "NO", "DK", "FI", "PL", "PT", "IE", "CZ",
    "HU", "GR", "RO", "AU", "NZ", "IN", "PK", "BD", "JP", "CN", "KR", "SG", "HK", "TW", "MY", "TH", "VN", "PH",
    "ID", "BR", "MX", "AR", "CL", "CO", "PE", "ZA", "NG", "KE", "EG", "MA", "IL", "AE", "SA", "TR", "RU", "UA",
    "IS", "EE", "SI", "HR", "BG", "LT", "CY",
)  # fmt: skip
# Of these, those that write a leading zero.
_TRUNK_REGIONS = (
    "GB", "DE", "FR", "NL", "BE", "AT", "CH", "SE", "IE", "FI", "AU", "NZ", "IN", "JP", "CN", "KR", "TH", "ID",
    "ZA", "NG", "KE", "EG", "MA", "IL", "TR", "UA", "RO", "HR", "SI", "BG", "IT", "TW", "MY", "PH", "PK", "AR",
)  # fmt: skip


def find_phones(text: str) -> Iterator[Found]:
    """Phone numbers with their extension."""
    reached = 0
    for match in _CANDIDATE.finditer(text):
        if match.start() < reached:
            continue
        if end := _phone_end(text, match):
            extension = _EXTENSION.match(text, end)
            reached = extension.end() if extension else end
            yield Found(match.start(), reached, "PHONE")


def _phone_end(text: str, match: re.Match[str]) -> int:
    """Where the number ends that begins a run of digits; 0 if none does. The longest number counts."""
    start, front = match.start(), before(text, match.start(), 56)
    is_labelled = bool(_LABEL.search(front))
    is_meant = is_labelled or bool(_CONTEXT.search(front))
    if not is_labelled and ((is_meant and _NOT_DIALLED.search(front)) or inside_url(text, start)):
        return 0
    ends = [start + group.end() for group in _GROUP.finditer(match[0])]
    for end in reversed(ends):
        is_whole = end == ends[-1]
        if text.count("(", start, end) > text.count(")", start, end):
            end += 1
        number = text[start:end]
        digits = sum(map(str.isdigit, number))
        if digits < 7 or _DATE.fullmatch(number):
            return 0
        is_named = bool(_LABEL_AFTER.match(text, end))
        if digits > 15 or (not is_named and _AFTER.match(text, end) and not _EXTENSION.match(text, end)):
            continue
        if is_labelled and is_whole:
            return end
        if _is_allowed(number) if is_meant or is_named else _speaks_for_itself(text, start, end, is_whole=is_whole):
            return end
    return 0


def _speaks_for_itself(text: str, start: int, end: int, *, is_whole: bool) -> bool:
    """Whether the form alone says that it is a phone number: a country code, or a country's grouping."""
    number = text[start:end]
    if number.startswith(("+", "(+")):
        return _is_international(number)
    if not is_whole:
        return False
    if _NUMBER_BEFORE.search(before(text, start, 4)) or _NUMBER_AFTER.match(text, end):
        return False  # a row of numbers
    if number.startswith("00") and _SEPARATORS.search(number[:8]):
        return _is_international(f"+{number[2:]}")
    if number.startswith("011") and _SEPARATORS.search(number[:4]):
        return _is_international(f"+{number[4:]}")
    if _NANP.fullmatch(number):
        return _is_valid(re.sub(r"\D", "", number), "US")
    return _is_grouped_as_somewhere(_SEPARATORS.sub(" ", number).strip())


@lru_cache(maxsize=4096)
def _is_international(number: str) -> bool:
    # The zero that is dialled inside the country only: +49 (0)30 901820.
    return _is_valid(number.replace("(0)", ""), None)


def _is_valid(number: str, region: str | None) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


@lru_cache(maxsize=4096)
def _is_allowed(number: str) -> bool:
    """Whether the words around suffice: some country allows the number, or it has the length that its code asks for."""
    if number.startswith(("+", "(+", "00")):
        try:
            parsed = phonenumbers.parse(re.sub(r"^\(?(?:\+|00)", "+", number).replace("(0)", ""), None)
        except phonenumbers.NumberParseException:
            return False
        return phonenumbers.is_possible_number(parsed)
    digits = re.sub(r"\D", "", number)
    if len(digits) < 9 and (len(digits) == len(number) or _LOCAL.fullmatch(number)):
        return len(digits) != len(number)
    return len(digits) > 7 and any(_is_valid(digits, region) for region in _REGIONS)


@lru_cache(maxsize=4096)
def _is_grouped_as_somewhere(number: str) -> bool:
    """Whether a country with leading zeros allows a number and writes it in these groups."""
    if not re.fullmatch(r"0[1-9][0-9]{0,4}(?: [0-9]{2,8}){1,4}", number) or not 9 <= len(number.replace(" ", "")) <= 11:
        return False
    for region in _TRUNK_REGIONS:
        if not _is_valid(number, region):
            continue
        parsed = phonenumbers.parse(number, region)
        written = phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.NATIONAL)
        if _SEPARATORS.sub(" ", written).strip() == number:
            return True
    return False
