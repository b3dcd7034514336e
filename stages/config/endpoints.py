"""Which HTTP endpoints a run may ask: whoever may trigger a run chooses an address, whoever runs the workers decides.

A request carries texts of the run and perhaps a key of the operator's. So an endpoint must begin with one of the
addresses in `ATHANOR_JUDGE_ENDPOINTS` (separated by spaces or commas), in the environment of Airflow and of Ray's
workers. One on loopback need not, unless a key is sent there.
"""

import os
from ipaddress import ip_address
from urllib.parse import urlsplit

from stages.config.errors import ConfigError

ALLOWED = "ATHANOR_JUDGE_ENDPOINTS"


def is_endpoint(address: str) -> bool:
    """Whether an address is one that HTTP reaches."""
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def without_credentials(address: str) -> str:
    """Return the address without user, password, query and fragment."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def check_endpoint(address: str, *, field: str, with_key: bool) -> None:
    """Raise ConfigError unless the endpoint may be asked, and be sent a key."""
    if not is_endpoint(address):
        raise ConfigError(f"{field}={without_credentials(address)!r} is no address of an endpoint")
    allowed = os.environ.get(ALLOWED, "").replace(",", " ").split()
    if any(_begins_with(address, prefix) for prefix in allowed) or (_on_loopback(address) and not with_key):
        return
    what = "may be sent a key" if with_key else "may be asked"
    raise ConfigError(
        f"{field}={without_credentials(address)!r} is not an endpoint that {what}; allowed: "
        f"{', '.join(map(without_credentials, allowed)) or 'none but loopback, without a key'}",
        advice=f"Let the operator add it to {ALLOWED}, in the environment of Airflow and of Ray's workers.",
    )


def _begins_with(address: str, prefix: str) -> bool:
    """By whole parts: https://host does not allow https://host.elsewhere, nor another port or scheme."""
    asked, given = urlsplit(address), urlsplit(prefix)
    path, folder = asked.path.rstrip("/"), given.path.rstrip("/")
    same_server = (asked.scheme, asked.hostname, _port(asked.scheme, asked.port)) == (
        given.scheme,
        given.hostname,
        _port(given.scheme, given.port),
    )
    return same_server and ".." not in path.split("/") and (path == folder or path.startswith(f"{folder}/"))


def _port(scheme: str, port: int | None) -> int:
    return port or (443 if scheme == "https" else 80)


def _on_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
