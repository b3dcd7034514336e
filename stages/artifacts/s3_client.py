"""The boto3 client for any S3-compatible server, and what its errors mean in words.

Endpoint, keys and certificates come from the standard AWS variables. One client serves all stores of a process. boto3
is imported when the first client is made.
"""

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from stages.config.errors import Category, StageError

ABSENT = frozenset({"404", "NoSuchKey", "NotFound"})
"""Error codes for a missing object; servers differ, and a HEAD request has no body that could say more than 404."""
EXISTS = frozenset({"412", "PreconditionFailed"})
"""Error codes of a conditional put that lost."""
_TRANSIENT = frozenset(
    {"429", "SlowDown", "SlowDownWrite", "RequestTimeout", "ServiceUnavailable", "InternalError", "Throttling"}
    | {"ThrottlingException", "RequestLimitExceeded", "ConditionalRequestConflict", "OperationAborted"}
)
KEYS_REFUSED = frozenset(
    {"400", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
    | {"TokenRefreshRequired"}
)
_REGION = ("the region is wrong", "Set AWS_REGION to the bucket's region.", Category.CONFIG)
_KEY = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile or role that stands for them."
_RIGHTS = "Give the key the rights that docs/DEPLOY.md lists for the bucket and the prefix."
_WORDS: dict[str, tuple[str, str, Category]] = {
    "NoSuchBucket": (
        "the bucket does not exist",
        "Create it, or correct ARTIFACT_STORE and AWS_ENDPOINT_URL.",
        Category.CONFIG,
    ),
    "InvalidAccessKeyId": ("the server does not know the access key", _KEY, Category.CONFIG),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", _KEY, Category.CONFIG),
    "AccessDenied": ("access is denied", _RIGHTS, Category.INFRASTRUCTURE),
    "403": ("access is denied", _RIGHTS, Category.INFRASTRUCTURE),
    "ExpiredToken": ("the session token has expired", "Renew the credentials.", Category.INFRASTRUCTURE),
    "RequestTimeTooSkewed": (
        "the clocks of this machine and of the server differ too much",
        "Set this machine's clock, best by NTP.",
        Category.INFRASTRUCTURE,
    ),
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "QuotaExceeded": ("the quota is used up", "Raise it, or run `python -m infra gc`.", Category.INFRASTRUCTURE),
    "EntityTooLarge": (
        "the quota is used up, or the object is larger than the server takes",
        "Raise the quota, or run `python -m infra gc`.",
        Category.INFRASTRUCTURE,
    ),
    "InsufficientStorage": ("the server is full", "Make room: `python -m infra gc`.", Category.INFRASTRUCTURE),
    "MissingContentLength": (
        "the server does not take checksums that follow the data",
        "Set AWS_REQUEST_CHECKSUM_CALCULATION=when_required.",
        Category.CONFIG,
    ),
}


class StoreError(StageError):
    """The object store refused, or did not answer within our patience."""

    def __init__(self, message: str, *, advice: str = "", category: Category = Category.INFRASTRUCTURE) -> None:
        super().__init__(message, advice=advice)  # `advice` has a default because pickle passes the message alone
        self.category = category


@dataclass(frozen=True)
class Patience:
    """How long a client waits for a server."""

    outage_seconds: float
    """From the first failure of a call to giving up; 0 gives up at once."""
    connect_seconds: float
    read_seconds: float
    tries: int
    """Attempts of boto3 within one call, for failures of a moment; during an outage the call itself is repeated."""


PATIENT = Patience(outage_seconds=180, connect_seconds=10, read_seconds=60, tries=3)
"""For work: longer than the restart of a server."""
HASTY = Patience(outage_seconds=0, connect_seconds=3, read_seconds=10, tries=1)
"""For questions about the server itself."""


_making = threading.Lock()


def _new_lock() -> None:
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # the thread that held the lock does not exist in the child


def s3_client(patience: Patience = PATIENT) -> Any:
    """This process's client for the current AWS variables; threads may share a client, processes never."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "HOME")
    settings = tuple(
        sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_") or name.upper() in names)
    )
    with _making:
        return _make_client(os.getpid(), settings, patience)


@lru_cache(maxsize=8)
def _make_client(pid: int, settings: tuple[tuple[str, str], ...], patience: Patience) -> Any:
    import boto3
    from botocore.config import Config

    given = dict(settings)
    elsewhere = given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL")
    # A session of its own, because the default session keeps the first keys that it read. Path-style addresses and
    # checksums only where required: what every S3-compatible server understands.
    return boto3.Session().client(
        "s3",
        config=Config(
            retries={"total_max_attempts": patience.tries, "mode": "standard"},
            connect_timeout=patience.connect_seconds,
            read_timeout=patience.read_seconds,
            max_pool_connections=40,
            s3={"addressing_style": "path"} if elsewhere else {},
            request_checksum_calculation=given.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),  # type: ignore[arg-type]
            response_checksum_validation=given.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required"),  # type: ignore[arg-type]
        ),
    )


def renew_keys() -> None:
    """Let the next call read the keys again: a mounted secret may have been rotated since the process began."""
    with _making:
        _make_client.cache_clear()


def error_code(error: BaseException) -> str:
    """The code by which the server names a refusal; empty for other errors."""
    response = getattr(error, "response", None)  # errors of a broken connection have the attribute too, as None
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: no answer, half an answer, or a server that asks to slow down."""
    from botocore import exceptions as boto
    from s3transfer.exceptions import RetriesExceededError

    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return error_code(error) in _TRANSIENT or (500 <= status < 600 and status not in (501, 507))
    if isinstance(error, boto.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    transient = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, RetriesExceededError)
    return isinstance(error, (*transient, boto.CredentialRetrievalError, boto.MetadataRetrievalError))


def in_words(error: BaseException, root_uri: str) -> StoreError:
    """Turn an error into one that says what is wrong and what to do; the server's own text is kept."""
    from botocore import exceptions as boto

    code = error_code(error)
    if code in _WORDS:
        what, advice, category = _WORDS[code]
        return StoreError(f"{root_uri}: {what} ({error})", advice=advice, category=category)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return StoreError(f"{root_uri}: no credentials were found ({error})", advice=_KEY, category=Category.CONFIG)
    if isinstance(error, boto.SSLError):
        advice = "Set AWS_CA_BUNDLE to the file with the certificate of the server's own authority."
        return StoreError(f"{root_uri}: the server's certificate is not trusted ({error})", advice=advice)
    if isinstance(error, boto.ClientError):
        return StoreError(f"{root_uri}: the server refused: {error}", advice="Run `make doctor`.")
    advice = "Check that the server runs and that AWS_ENDPOINT_URL is right, then run `make doctor`."
    return StoreError(f"{root_uri}: the server does not answer ({error})", advice=advice)
