"""Addresses of HTTP servers as people write them, checked before a client makes something else of them.

Not by `urlsplit`: it takes a bare IPv6 address for a name with a port, and ignores what follows a '?' or '#'. Standard
library only, because `make compose-env` reads this before anything is installed.
"""

import re
from ipaddress import IPv4Address, IPv6Address

SCHEMES = ("http", "https")
_BRACKETS = re.compile(r"\[([^\[\]]*)\](?::(.*))?", re.DOTALL)
_NAME = re.compile(r"[\w-][\w.-]*")
_PATH = re.compile(r"(?:[\w.~!$&'()*+,;=:/-]|%[0-9A-Fa-f]{2})*", re.ASCII)
_DOTS = re.compile(r"(?i)(?:^|/)(?:\.|%2e){1,2}(?:/|$)")


class AddressError(ValueError):
    """The message says which value is wrong and what is allowed; `advice`, what to write instead."""

    def __init__(self, message: str, *, advice: str) -> None:
        super().__init__(message)
        self.advice = advice


def server_address(host: str, *, scheme: str, port: int | None, default_port: int) -> str:
    """Return the URL of a server whose host is a name, an IP address, either with a port and a path, or a whole URL.

    A whole URL is taken as it is: `scheme` and the ports count for all others. Raises AddressError, also when the host
    holds another port than `port`.
    """
    host = host.strip()
    before, separator, after = host.partition("://")
    scheme = (before if separator else scheme).lower()
    if scheme not in SCHEMES:
        raise AddressError(
            f"scheme {scheme!r} is not allowed; allowed: http and https",
            advice="Write http or https: jobs are submitted over HTTP, by default on port 8265.",
        )
    authority, slash, path = (after if separator else host).partition("/")
    path = f"/{path}".rstrip("/")
    try:
        name, own_port = split_authority(authority, bare_ipv6=not separator and not slash)
    except ValueError as error:
        raise _no_address(host, f": {error}") from None
    if not _PATH.fullmatch(path) or _DOTS.search(path):
        raise _no_address(host)
    if port is not None and not 0 < port < 65536:
        raise AddressError(f"port={port} is not allowed; allowed: 1 to 65535", advice="Correct the port.")
    if None not in (own_port, port) and own_port != port:
        raise AddressError(f"port={own_port} in the host and port={port} differ", advice="Remove one of them.")
    if own_port is None and not separator:
        own_port = port or default_port
    return f"{scheme}://{name}{'' if own_port is None else f':{own_port}'}{path}"


def is_web_address(text: str) -> bool:
    """Whether an address starts with http:// or https:// and a host that can exist; a login may stand before it."""
    scheme, _, rest = text.partition("://")
    if scheme.lower() not in SCHEMES or not text.isprintable():
        return False
    try:
        split_authority(re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2])
    except ValueError:
        return False
    return True


def split_authority(text: str, *, bare_ipv6: bool = False) -> tuple[str, int | None]:
    """Split `name:port` into host, an IPv6 address in brackets, and port; ValueError with the reason for what is none.

    `bare_ipv6` also allows an IPv6 address without brackets, which no port can follow.
    """
    if found := _BRACKETS.fullmatch(text):
        name, port = f"[{_ipv6(found[1])}]", found[2]
    elif bare_ipv6 and text.count(":") > 1:
        return f"[{_ipv6(text)}]", None
    else:
        name, colon, port = text.partition(":")
        port = port if colon else None
        if not _NAME.fullmatch(name) or ".." in name:
            raise ValueError("it has no valid name of a host")
        if re.fullmatch(r"[\d.]+", name):
            IPv4Address(name)
    if port is None:
        return name, None
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"its port {port!r} is not a number from 1 to 65535")
    return name, int(port)


def _ipv6(text: str) -> str:
    if "%" in text:
        raise ValueError("the zone of an IPv6 address cannot be part of a URL")
    return str(IPv6Address(text))


def _no_address(host: str, reason: str = "") -> AddressError:
    # What follows '?' may be a token, and errors are shown to every viewer.
    shown = re.sub(r"(?s)([?#]).*", r"\1...", host)
    return AddressError(
        f"host={shown!r} is not an address{'' if shown != host else reason}",
        advice="Write a name or IP address, name:port, [IPv6 address]:port, each with a path if need be, or a whole "
        "URL such as https://ray.example.org/path.",
    )
