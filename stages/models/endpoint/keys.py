"""The key of an endpoint, and never told: from a variable in the environment of this process, or from the keys that
Airflow sealed for this job."""

import os
from collections.abc import Sequence

from stages.config.endpoint_keys import KeyedEndpoint
from stages.config.endpoints import KEY_CONNECTION, EndpointConfig, is_fit_for_header
from stages.config.errors import ConfigError
from stages.config.seals import SEALED_KEYS, Seal, open_seal


def require_keys(endpoints: Sequence[KeyedEndpoint], *, job: str) -> None:
    """Raise unless the keys of these endpoints can be opened, and were sealed for this job and lately.

    A job asks this when it starts. Its processes open the seal again when they make a client, however old it is by
    then: a stage may run for weeks, and its workers may be replaced.
    """
    for endpoint in endpoints:
        seal = _opened(endpoint.connection, field=endpoint.field)
        seal.require_for(job)
        _key_of(seal, endpoint.connection, field=endpoint.field)


def key_of(config: EndpointConfig, *, field: str) -> str:
    """Return the key, empty for an endpoint without one; `field` is the path of its settings. Errors name the variable
    or the connection and never what is in it."""
    if config.api_key_connection:
        where = f"{field}.{KEY_CONNECTION}"
        return _key_of(_opened(config.api_key_connection, field=where), config.api_key_connection, field=where)
    return key_in(config.api_key_env, field=f"{field}.api_key_env")


def key_in(variable: str, *, field: str) -> str:
    """Read the key; empty without a variable. Errors name the variable and never what is in it."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()  # a file that it was read from ends with a line end
    if not key:
        raise ConfigError(
            f"{field}={variable!r} is not set where Ray's processes run",
            advice="Set it in the environment of Ray's workers, or leave api_key_env empty.",
        )
    if not is_fit_for_header(key):
        raise ConfigError(
            f"{field}={variable!r} holds characters that no HTTP header may have; allowed are "
            "printable ASCII characters",
            advice="Set it again in the environment of Ray's workers: the key alone, without line ends in it.",
        )
    return key


def _opened(connection: str, *, field: str) -> Seal:
    sealed = os.environ.get(SEALED_KEYS, "")
    if not sealed:
        raise ConfigError(
            f"{field}={connection!r} is a connection of Airflow's, and this job was started without {SEALED_KEYS}",
            advice="Start it from Airflow, which seals the key for the job, or use api_key_env.",
        )
    return open_seal(sealed)


def _key_of(seal: Seal, connection: str, *, field: str) -> str:
    if connection not in seal.keys:
        held = ", ".join(sorted(seal.keys)) or "none"
        raise ConfigError(
            f"{field}={connection!r} is not among the sealed keys of this job: {held}",
            advice="Airflow and Ray run different versions of Athanor; give both the same one.",
        )
    return seal.keys[connection]
