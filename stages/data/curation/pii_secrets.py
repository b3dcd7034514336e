"""Credentials: tokens by the form their makers gave them, private keys, and random values that are called a secret.

The table is ours, because detect-secrets reads 0.2 MB/s and its rule for random strings alone would take every
commit id and digest out of technical text. Here entropy decides only next to a word such as password or token.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

from stages.data.curation.pii_spans import Found

# (what the text must hold, the whole token). The search for a fixed string is a hundred times faster than a pattern,
# and each pattern begins with its string or is only tried where the string stands.
_TOKENS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (literal, re.compile(pattern))
    for literal, pattern in (
        *((prefix, prefix + r"[A-Z0-9]{16}(?![A-Z0-9])") for prefix in ("AKIA", "ASIA", "ABIA", "ACCA")),
        *((f"gh{kind}_", rf"gh{kind}_[A-Za-z0-9]{{36,255}}") for kind in "pousr"),
        ("github_pat_", r"github_pat_[A-Za-z0-9_]{22,255}"),
        *(
            (f"{prefix}-", rf"{prefix}-[A-Za-z0-9_.-]{{20,300}}")
            for prefix in ("glpat", "gldt", "glrt", "glcbt", "glptt", "glft", "glsoat", "glimt", "glagent", "gloas")
        ),
        ("xox", r"xox[abeoprs]-(?:[A-Za-z0-9]+-){0,4}[A-Za-z0-9]{10,}"),
        ("xapp-", r"xapp-[0-9]-[A-Za-z0-9]+-[0-9]+-[A-Za-z0-9]{20,}"),
        ("hooks.slack.com", r"hooks\.slack\.com/services/T[A-Za-z0-9_]{6,}/B[A-Za-z0-9_]{6,}/[A-Za-z0-9_]{16,}"),
        ("discord", r"discord(?:app)?\.com/api/webhooks/[0-9]{16,20}/[A-Za-z0-9_-]{60,80}"),
        *((f"{kind}k_{mode}_", rf"{kind}k_{mode}_[A-Za-z0-9]{{16,247}}") for kind in "sr" for mode in ("live", "test")),
        ("whsec_", r"whsec_[A-Za-z0-9+/]{24,}={0,2}"),
        ("AIza", r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
        ("GOCSPX-", r"GOCSPX-[A-Za-z0-9_-]{28}"),
        ("ya29.", r"ya29\.[A-Za-z0-9_-]{30,}"),
        ("sk-", r"sk-(?:(?:proj|svcacct|admin|ant-[a-z]+[0-9]*|or-v1)-[A-Za-z0-9_-]{32,}|[A-Za-z0-9]{32,})"),
        ("hf_", r"hf_[A-Za-z0-9]{30,40}(?![A-Za-z0-9_])"),
        ("npm_", r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9_])"),
        ("pypi-", r"pypi-AgE[A-Za-z0-9_-]{50,}"),
        ("SG.", r"SG\.[A-Za-z0-9_-]{20,24}\.[A-Za-z0-9_-]{39,50}"),
        ("key-", r"key-[0-9a-f]{32}(?![0-9a-f])"),
        ("AC", r"AC[0-9a-f]{32}(?![0-9A-Za-z])"),
        ("SK", r"SK[0-9a-f]{32}(?![0-9A-Za-z])"),
        (":AA", r"[0-9]{8,10}:AA[A-Za-z0-9_-]{33}(?![A-Za-z0-9_-])"),
        ("sq0", r"sq0(?:atp|csp)-[A-Za-z0-9_-]{22,43}"),
        ("eyJ", r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{16,}"),
        ("AccountKey=", r"(?<=AccountKey=)[A-Za-z0-9+/]{40,86}={0,2}"),
        ("SharedAccessKey=", r"(?<=SharedAccessKey=)[A-Za-z0-9+/]{40,86}={0,2}"),
        ("AKC", r"AKC[A-Za-z0-9]{60,80}"),
        ("_v1_", r"do[opr]_v1_[0-9a-f]{64}"),
        ("dapi", r"dapi[0-9a-f]{32}(?![0-9a-z])"),
        ("shp", r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}(?![0-9a-zA-Z])"),
        ("hvs.", r"hvs\.[A-Za-z0-9_-]{24,}"),
        ("lin_api_", r"lin_api_[A-Za-z0-9]{40}"),
        ("glsa_", r"glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}"),
        ("dckr_pat_", r"dckr_pat_[A-Za-z0-9_-]{27}"),
        ("PMAK-", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}"),
        ("NRAK-", r"NRAK-[A-Z0-9]{27}"),
        ("dp.pt.", r"dp\.pt\.[A-Za-z0-9]{40,}"),
        ("gsk_", r"gsk_[A-Za-z0-9]{40,}"),
        ("r8_", r"r8_[A-Za-z0-9]{37}(?![A-Za-z0-9])"),
        ("ATATT3", r"ATATT3[A-Za-z0-9_=-]{100,}"),
        ("EAACEdEose0cBA", r"EAACEdEose0cBA[A-Za-z0-9]+"),
        ("sntrys_", r"sntrys_[A-Za-z0-9+/=_-]{40,}"),
        ("AGE-SECRET-KEY-", r"AGE-SECRET-KEY-1[0-9A-Z]{58}"),
        (".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,70}"),
    )
)
_MAILCHIMP = re.compile(
    r"-us[0-9]{1,2}(?![A-Za-z0-9])(?<=[0-9a-f]{32}-us[0-9])|-us[0-9]{2}(?![A-Za-z0-9])(?<=[0-9a-f]{32}-us[0-9]{2})"
)
# Bot tokens of Discord have nothing fixed but their shape.
_DISCORD = re.compile(
    r"[MNO](?<![\w.-][MNO])[A-Za-z0-9_-]{23,25}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,38}(?![A-Za-z0-9_.-])"
)

_KEY_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_KEY_END = re.compile(r"-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_KEY_BODY = re.compile(r"(?:[A-Za-z0-9+/=\s]|\\n|[\"',|>#*])*")
_KEY_CHARACTERS, _KEY_LIMIT = 64, 20_000
_PUTTY = re.compile(
    r"PuTTY-User-Key-File-[0-9]:.{0,4000}?Private-Lines: [0-9]+\r?\n(?:[A-Za-z0-9+/=]+\r?\n?)+", re.DOTALL
)

_NAMES = (
    "password", "passwd", "passphrase", "pwd", "secret", "token", "credential", "apikey", "api_key", "api-key",
    "accesskey", "access_key", "access-key", "private_key", "account_key", "auth_key", "encryption_key", "signing_key",
)  # fmt: skip
_VALUE = r"[^\s\"'`,;()<>{}\[\]&\\]{8,400}"
# What follows a name, on the text in lower case: the rest of the name, an assignment, and the value.
_ASSIGNMENT = re.compile(
    r"(?P<rest>[a-z0-9_-]{0,24})[\"'\]]{0,2}[ \t]{0,4}(?:=>|:=|==?|:| is | was )[ \t]{0,4}[bru]?"
    rf"(?:(?P<quote>[\"'`])(?P<quoted>{_VALUE})(?P=quote)|(?P<plain>{_VALUE})(?=[\s,;)\]}}\"'&\\]|$))"
)
_HEADERS = ("bearer ", "basic ", "authorization: token ")
_CREDENTIALS = re.compile(r"[A-Za-z0-9+/=._~-]{16,400}")
_OTHER_NAME = re.compile(
    r"(?:hash|digest|sha|type|url|uri|name|file|path|count|len|size|limit|expir|class|field|header|index|regex|pattern|error"
    r"|s?_?ids?$|iz|ise|env)"
)
_PLACEHOLDER = re.compile(
    r"x{4}|p[a4@]ss|exampl|\*{3}|\.{3}|example|changeme|change[_-]me|your|placeholder|dummy|redact|insert|replace|foo|bar\b|env|none|null"
    r"|undefined|secret|1234|abcd|[${}<>%]|://|\\n"
)
_WORDS = re.compile(r"[A-Za-z]?[a-z]{3,}|[A-Z]{4,}")
_NAME_IN_CODE = re.compile(r"[A-Za-z_][A-Za-z_]*\d{0,2}(?:[.:/-][A-Za-z_]+\d{0,2})*")


def find_private_keys(text: str) -> Iterator[Found]:
    """Blocks of private keys, whole; a mention of the header without a key stays."""
    if "PRIVATE KEY" in text:
        for begin in _KEY_BEGIN.finditer(text):
            closing = _KEY_END.search(text, begin.end(), begin.end() + _KEY_LIMIT)
            body = _KEY_BODY.match(text, begin.end(), begin.end() + _KEY_LIMIT)
            end = closing.end() if closing else body.end() if body else begin.end()
            if sum(map(str.isalnum, text[begin.end() : end])) >= _KEY_CHARACTERS:
                yield Found(begin.start(), end, "PRIVATE_KEY")
    if "PuTTY-User-Key-File-" in text:
        yield from (Found(*match.span(), "PRIVATE_KEY") for match in _PUTTY.finditer(text))


def find_secrets(text: str) -> Iterator[Found]:
    """Tokens of known form, and values of high entropy that are assigned to a password, token or key."""
    for literal, pattern in _TOKENS:
        if literal in text:
            for match in pattern.finditer(text):
                is_part = re.match(r"[A-Za-z0-9_]", text[match.start() - 1 : match.start()])
                if not is_part and _is_no_example(match[0]):
                    yield Found(*match.span(), "SECRET")
    for match in _DISCORD.finditer(text):
        if _entropy(match[0]) > 4:
            yield Found(*match.span(), "SECRET")
    yield from (Found(match.start() - 32, match.end(), "SECRET") for match in _MAILCHIMP.finditer(text))
    yield from _assigned(text)


def _assigned(text: str) -> Iterator[Found]:
    lower = text.lower()
    if len(lower) != len(text):  # some letters have a longer lower case, which would move the places
        lower = text.translate(_ASCII_LOWER)
    # The search for fixed strings is fast; the pattern is tried only where a name stands.
    for name in _NAMES:
        for end in _ends_of(name, lower):
            match = _ASSIGNMENT.match(lower, end)
            if match is None or _OTHER_NAME.search(match["rest"]):
                continue
            place = "quoted" if match["quoted"] else "plain"
            if _looks_random(text[match.start(place) : match.end(place)], is_quoted=place == "quoted"):
                yield Found(*match.span(place), "SECRET")
    for name in _HEADERS:
        for end in _ends_of(name, lower):
            match = _CREDENTIALS.match(text, end)
            if match and _looks_random(match[0], is_quoted=False):
                yield Found(*match.span(), "SECRET")


def _ends_of(name: str, text: str) -> Iterator[int]:
    """Where each occurrence of a fixed string ends."""
    place = text.find(name)
    while place >= 0:
        yield place + len(name)
        place = text.find(name, place + len(name))


_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def _is_no_example(token: str) -> bool:
    """Documentation shows tokens that are all x, or say what they are."""
    return len(set(token)) >= 10 and not re.search(r"EXAMPLE|example|x{6}|X{6}|0{8}|12345678|abcdef", token)


def _looks_random(value: str, *, is_quoted: bool) -> bool:
    """Whether a value that is called a secret is one: not a name, not words, and as varied as its length allows."""
    if _PLACEHOLDER.search(value.lower()) or _NAME_IN_CODE.fullmatch(value):
        return False
    kinds = [any(map(test, value)) for test in (str.islower, str.isupper, str.isdigit)]
    kinds.append(any(not character.isalnum() and character not in "_.-/:" for character in value))
    # Outside of quotes stands code, in which most values are names and numbers.
    if sum(kinds) < (2 if is_quoted or len(value) >= 20 else 3) or not any(kinds[:2]):
        return False
    if sum(map(len, _WORDS.findall(value))) > 0.6 * len(value):
        return False
    return _entropy(value) >= min(3.0, 0.8 * math.log2(len(value)))


def _entropy(value: str) -> float:
    """Shannon's entropy of a string's characters, in bits a character."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
