"""Keys of endpoints on their way from Airflow to a job, sealed: Ray's API shows a job's environment to everybody who
holds its token.

Airflow's tasks seal and jobs open, both with the key in `ATHANOR_SEAL_KEY`, which never travels. A seal is Fernet's
authenticated encryption (AES-128-CBC and HMAC-SHA-256, https://github.com/fernet/spec) behind the name of its sealing
key, so that a wrong key can be told from damage. It is good for one job, and for a day from its making.
"""

import base64
import binascii
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from stages.config.errors import ConfigError, StageError

SEAL_KEY = "ATHANOR_SEAL_KEY"
"""Variable with the sealing key, 32 bytes in URL-safe base64, in the environment of Airflow's tasks and of Ray's
processes. Several with commas between: the first one seals, all of them open."""
SEALED_KEYS = "ATHANOR_SEALED_KEYS"
"""Variable of a job's environment with its keys, sealed."""
NEW_KEY = "`openssl rand -base64 32 | tr '+/' '-_'`"
"""How a sealing key is made by hand."""
MAX_AGE_SECONDS = 24 * 3600.0
"""A job may wait for its turn, and opens the seal when it starts."""
_CLOCKS_DIFFER_SECONDS = 300.0

_AIRFLOW, _RAY = "where Airflow's tasks run", "where Ray's processes run"


class SealExpiredError(StageError):
    """The job started too long after its keys were sealed; the next attempt's are sealed anew."""


@dataclass(frozen=True)
class Seal:
    """What was in an opened seal. The keys are not shown."""

    job: str
    keys: Mapping[str, str] = field(repr=False)
    """By connection."""
    made_at: float
    """Seconds since the epoch, by the clock of Airflow's machine."""

    def require_for(self, job: str, *, now: float | None = None) -> None:
        """Raise unless it was made for this job, and lately."""
        if self.job != job:
            raise ConfigError(
                f"{SEALED_KEYS} was sealed for job {self.job!r}, and this is {job!r}",
                advice="Keys are sealed for one job only: start it from Airflow, which seals its own.",
            )
        age = (time.time() if now is None else now) - self.made_at
        if not -_CLOCKS_DIFFER_SECONDS <= age <= MAX_AGE_SECONDS:
            raise SealExpiredError(
                f"{SEALED_KEYS} was sealed {age:.0f} s before the job started, by this machine's clock; allowed are 0 "
                f"to {MAX_AGE_SECONDS:.0f} s",
                advice="The retry seals the keys anew. Compare the clocks of Airflow's and Ray's machines. If jobs "
                "wait longer than that for their turn, use api_key_env.",
            )


def require_sealing() -> None:
    """Raise ConfigError unless this process of Airflow has a sealing key."""
    _key_ring(where=_AIRFLOW)


def seal(keys: Mapping[str, str], *, job: str, now: float | None = None) -> str:
    """Seal keys, by connection, for one job; raises ConfigError without a sealing key."""
    from cryptography.fernet import Fernet  # comes with Airflow, and takes a moment to load

    name, key = next(iter(_key_ring(where=_AIRFLOW).items()))
    content = json.dumps({"job": job, "keys": dict(keys)}).encode()
    return f"{name}.{Fernet(key).encrypt_at_time(content, int(time.time() if now is None else now)).decode()}"


def open_seal(sealed: str) -> Seal:
    """Open a seal; raises ConfigError where that cannot be done, and says nothing of what is in it."""
    from cryptography.fernet import Fernet, InvalidToken

    ring = _key_ring(where=_RAY)
    name, _, token = sealed.partition(".")
    if name not in ring:
        raise ConfigError(
            f"{SEALED_KEYS} was sealed with key {name[:8]!r}, and {SEAL_KEY} {_RAY} is {' and '.join(ring)}",
            advice=f"Set {SEAL_KEY} to the same value in the environment of Airflow's tasks and of Ray's processes; "
            "`make doctor` shows the name of each.",
        )
    try:
        fernet = Fernet(ring[name])
        content = json.loads(fernet.decrypt(token))
        return Seal(job=content["job"], keys=content["keys"], made_at=fernet.extract_timestamp(token))
    except InvalidToken:
        raise ConfigError(
            f"{SEALED_KEYS} is damaged: its signature is not that of key {name}",
            advice="Start the job from Airflow again.",
        ) from None


def name_of_key(key: str) -> str:
    """By which people compare sealing keys: the beginning of its SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def read_key_ring(text: str) -> dict[str, str]:
    """Return the sealing keys by name, in order; ValueError for what is none, without repeating it."""
    ring = {}
    for number, key in enumerate(text.split(","), start=1):
        try:
            size = len(base64.b64decode(key.strip().encode(), altchars=b"-_", validate=True))
        except (ValueError, binascii.Error):
            size = -1
        if size != 32:
            found = "no base64" if size < 0 else f"{size} bytes"
            raise ValueError(f"key {number} is {found}; it must be 32 bytes in URL-safe base64")
        ring[name_of_key(key.strip())] = key.strip()
    return ring


def _key_ring(*, where: str) -> dict[str, str]:
    text = os.environ.get(SEAL_KEY, "").strip()
    if not text:
        raise ConfigError(
            f"{SEAL_KEY} is not set {where}, and a key of an endpoint comes from an Airflow connection",
            advice=f"Set it, to the same value for Airflow's tasks and Ray's processes: {NEW_KEY}. Or use api_key_env.",
        )
    try:
        return read_key_ring(text)
    except ValueError as error:
        raise ConfigError(f"{SEAL_KEY} {where}: {error}", advice=f"Make one with {NEW_KEY}.") from None
