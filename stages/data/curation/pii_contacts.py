"""E-mail addresses, IP addresses and URLs with logins.

Tuned against what looks like them in software docs and is not: git@host:path, matrix products (x@w.T), versions
(1.2.3.4), slices (a[1::2]), private and documentation addresses. Addresses are found from their one rare character
outwards (@, ://, the colons of IPv6), because a pattern that begins with any letter is tried at every letter.
"""

import re
from collections.abc import Iterator
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from stages.data.curation.pii_spans import Found, before

_SERVICES = frozenset({"git", "hg", "svn", "cvs", "bzr"})
_COMMON = frozenset({"com", "org", "net", "edu", "gov", "mil", "int", "info", "biz"})
# Delegated top-level domains that are also attributes and suffixes of files: an address only where the text says so.
_AMBIGUOUS = frozenset(
    {"build", "call", "cat", "data", "date", "day", "dot", "final", "map", "mov", "new", "now", "open", "run", "show"}
    | {"zip"}
)
# RFC 2606 and 6762 reserve these for examples and private networks; people write addresses with them.
_RESERVED = frozenset({"example", "invalid", "local", "test", "tld"})

_AT = re.compile("[@＠]")
_LOCAL_CHARACTERS = r"A-Za-z0-9À-ɏͰ-ϿЀ-ӿ._%+&'’-"
_LOCAL_BACKWARDS = re.compile(rf"[{_LOCAL_CHARACTERS}]{{1,65}}")
_DOMAIN = re.compile(
    r"(?:[^\W_]+(?:-+[^\W_]+)*[.．])+(?:[Xx][Nn]--[A-Za-z0-9-]{2,59}|[A-Za-z]{2,24}|[^\W\d_A-Za-z]{2,24})"
)
_AFTER_EMAIL = re.compile(r"[A-Za-z0-9_@＠(\[-]|[.．][A-Za-z0-9_]|:[\w~/]")
_USERINFO_BEFORE = re.compile(r"://[^\s/?#]*$")
_MAIL_BEFORE = re.compile(r"(?:<|mailto:|\be-?mail\b|\bmail\b|\bcontact\b|\bwrite\b)[^\n]{0,24}$", re.I)
_IN_BRACKETS = re.compile(rf"<([{_LOCAL_CHARACTERS}]{{1,64}}) at ((?:[A-Za-z0-9-]+\.)+[A-Za-z]{{2,24}})>")
_AT_WORD = re.compile(r"[\[({] ?(?:at|AT) ?[\])}]")
_SPELLED_DOMAIN = re.compile(
    r" ?(?:[A-Za-z0-9-]+(?:\.| ?[\[({] ?(?:dot|DOT) ?[\])}] ?))+[A-Za-z]{2,24}(?![A-Za-z0-9_-])"
)

_LOGIN = re.compile(r"://([^\s/?#@:\"'`<>\[\]()]{1,128})(?::([^\s/?#\"'`<>]{0,256}))?@(?=[\w\[])")
_NO_LOGIN = re.compile(
    r"[${}*]|\.\.|x{3}|^(?:your|my)?[_-]?(?:pass(?:word|wd)?|pwd|pw|secret|token|key|api_?key)$", re.I
)
_NO_USER = _SERVICES | {
    "user",
    "username",
    "anonymous",
    "anon",
    "guest",
    "root",
    "admin",
    "login",
    "token",
    "name",
}

_IPV4 = re.compile(r"[0-9](?<![\w.-][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w-]|\.\w)")
_IPV6_PART = re.compile(r":[0-9A-Fa-f]{1,4}:")
_IPV6_CHARACTERS = re.compile(r"[0-9A-Fa-f:]*")
_VERSION_BEFORE = re.compile(
    r"(?:\bversions?|\bver\.?|\brelease[ds]?|\bv|[=<>~!]=|\bsince|\badded in|\w-)\s*[:=]?\s*$", re.I
)
_ADDRESS_BEFORE = re.compile(
    r"(?:\bip\b|address|host|server|client|\bfrom\b|\bdns\b|ping|://|@|peer|remote)[^.\n]{0,24}$", re.I
)


@cache
def top_level_domains() -> frozenset[str]:
    """The delegated top-level domains, from the snapshot of the public suffix list that comes with tldextract."""
    from tldextract import TLDExtract  # brings an HTTP client along, which this never uses

    suffixes = TLDExtract(suffix_list_urls=(), cache_dir=None).tlds
    return frozenset(suffix for suffix in suffixes if "." not in suffix) | _RESERVED


def _is_top_level(name: str) -> bool:
    name = name.lower()
    if name.startswith("xn--"):
        try:
            name = name.encode("ascii").decode("idna")
        except UnicodeError:
            return False
    return name in top_level_domains()


def find_emails(text: str) -> Iterator[Found]:
    """Addresses, also in mailto:, with umlauts or a full-width @, and spelled as `name at host.org` in brackets."""
    for at in _AT.finditer(text):
        if found := _email_around(text, at.start()):
            yield found
    if " at " in text:
        for match in _IN_BRACKETS.finditer(text):
            if _is_top_level(match[2].rsplit(".", 1)[1]):
                yield Found(match.start() + 1, match.end() - 1, "EMAIL")
    for word in _AT_WORD.finditer(text):
        if domain := _SPELLED_DOMAIN.match(text, word.end()):
            gap = 1 if text[word.start() - 1 : word.start()] == " " else 0
            start = _local_start(text, word.start() - gap)
            if start >= 0 and _is_top_level(re.split(r"[^A-Za-z0-9]", domain[0])[-1]):
                yield Found(start, domain.end(), "EMAIL")


def _local_start(text: str, end: int) -> int:
    """Where the local part that ends here begins; -1 if there is none."""
    backwards = _LOCAL_BACKWARDS.match(before(text, end, 66)[::-1])
    if backwards is None or text[end - 1] in ".+%&'’":
        return -1
    local = backwards[0][::-1].lstrip(".%+&'’-")
    return end - len(local) if 0 < len(local) <= 64 else -1


def _email_around(text: str, at: int) -> Found | None:
    domain = _DOMAIN.match(text, at + 1)
    start = _local_start(text, at)
    if domain is None or start < 0:
        return None
    name, end = domain[0].replace("．", "."), domain.end()
    labels = name.split(".")
    if len(labels) > 2 and labels[-1].istitle() and labels[-2].lower() in _COMMON:  # a sentence begins without a space
        end -= len(labels.pop()) + 1
    elif _AFTER_EMAIL.match(text, end):
        return None
    local, host, top = text[start:at], labels[-2], labels[-1]
    if not _is_top_level(top) or local.lower() in _SERVICES:
        return None
    # Mixed case before a country, or one letter, is more often a product of matrices than an address.
    if len(top) == 2 and not top.islower() and (len(local) < 2 or len(host) < 3):
        return None
    front = before(text, start, 80)
    is_said = bool(_MAIL_BEFORE.search(front))
    if len(local) == 1 and not is_said and (len(host) < 3 or top.lower() not in _COMMON):
        return None
    if _USERINFO_BEFORE.search(front) or front.endswith(("@", "＠")):
        return None
    if top.lower() in _AMBIGUOUS and not is_said:
        return None
    return Found(start, end, "EMAIL")


def find_logins(text: str) -> Iterator[Found]:
    """The `user:password` of a URL; users that are services or examples stay, as in ssh://git@host."""
    for match in _LOGIN.finditer(text):
        user, password = match[1], match[2]
        if password is None:
            if user.lower() not in _NO_USER and not _NO_LOGIN.search(user):
                yield Found(match.start(1), match.end(1), "LOGIN")
        elif password and password.lower() != user.lower() and not _NO_LOGIN.search(password):
            yield Found(match.start(1), match.end(2), "LOGIN")


def find_ip_addresses(text: str) -> Iterator[Found]:
    """Global addresses of both versions."""
    for match in _IPV4.finditer(text):
        if _is_ipv4(match):
            yield Found(*match.span(), "IPV4")
    last = -1
    # Three groups at least: so one has a colon on both sides, and `::` alone, which code is full of, is not looked at.
    for part in _IPV6_PART.finditer(text):
        if part.start() < last:
            continue
        left = _IPV6_CHARACTERS.match(before(text, part.start(), 40)[::-1])
        right = _IPV6_CHARACTERS.match(text, part.end(), part.end() + 40)
        start, last = part.start() - len(left[0] if left else ""), right.end() if right else part.end()
        if _is_ipv6(text, start, last):
            yield Found(start, last, "IPV6")


def _is_ipv4(match: re.Match[str]) -> bool:
    """A global address; four numbers below 100 count only where the words before say that they are an address."""
    octets = match[0].split(".")
    if any((len(octet) > 1 and octet[0] == "0") or int(octet) > 255 for octet in octets):
        return False
    address = ip_address(match[0])
    if not isinstance(address, IPv4Address) or not address.is_global or address.is_multicast:
        return False
    front = before(match.string, match.start(), 32)
    if _VERSION_BEFORE.search(front):
        return False
    if all(int(octet) < 100 for octet in octets):
        after = match.string[match.end() : match.end() + 2]
        return bool(_ADDRESS_BEFORE.search(front) or re.match(r"[:/]\d", after))
    return True


def _is_ipv6(text: str, start: int, end: int) -> bool:
    around = text[start - 1 : start] + text[end : end + 1]
    if re.search(r"[\w.]", around[:1] if start else "") or re.match(r"\w", text[end : end + 1]):
        return False
    parts = [part for part in text[start:end].split(":") if part]
    if len(parts) < 3 or end - start > 39:
        return False
    try:
        address = ip_address(text[start:end])
    except ValueError:
        return False
    return isinstance(address, IPv6Address) and address.is_global
