"""A prefix of a bucket on any S3-compatible server; endpoint, keys and certificates by the standard AWS variables.

Surprising on purpose: one client serves all stores of a process; an outage is waited out with growing, random pauses;
keys that are refused are looked up once more, for they may have been replaced on disk; and the server's refusals
become errors in words. boto3 is imported when the first client is made.
"""

import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from stages.artifacts.store import Listed, Unfinished, check_key
from stages.config.errors import Category, StageError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PART_BYTES = 16 * 2**20
"""Files above this go up in parts; boto3 makes the parts of very large files larger, for there are 10,000 at most."""
_LONGEST_PAUSE_SECONDS = 20.0
_ABSENT = frozenset({"404", "NoSuchKey", "NotFound"})
_EXISTS = frozenset({"412", "PreconditionFailed"})
_PASSING = frozenset(
    {"429", "SlowDown", "SlowDownWrite", "RequestTimeout", "ServiceUnavailable", "InternalError", "Throttling"}
    | {"ThrottlingException", "RequestLimitExceeded", "ConditionalRequestConflict", "OperationAborted"}
)
_KEYS_REFUSED = frozenset(
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
    """The object store refused, or did not answer for as long as we are patient."""

    def __init__(self, message: str, *, advice: str = "", category: Category = Category.INFRASTRUCTURE) -> None:
        super().__init__(message, advice=advice)  # `advice` has a default for pickle, which knows the message alone
        self.category = category


@dataclass(frozen=True)
class Patience:
    """How long a client waits for a server."""

    outage_seconds: float
    """From the first failure of a call to giving up; 0 gives up at once."""
    connect_seconds: float
    read_seconds: float
    tries: int
    """Of boto3, for what is over in a moment; each outage of ours holds many of them."""


PATIENT = Patience(outage_seconds=180, connect_seconds=10, read_seconds=60, tries=3)
"""For work: longer than a server's restart."""
HASTY = Patience(outage_seconds=0, connect_seconds=3, read_seconds=10, tries=1)
"""For questions about the server itself."""


# ------------------------------------------------------------------ client

_making = threading.Lock()


def _new_lock() -> None:
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # a thread that held it is not there any more


def s3_client(patience: Patience = PATIENT) -> Any:
    """This process's client for the present AWS variables; clients may be shared by threads, never by processes."""
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
    # A session of its own, for the default one remembers the first keys that it saw. Path-style addresses and
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


def _renew_keys() -> None:
    """Let the next call read the keys anew: what mounts them may have replaced them since the process began."""
    with _making:
        _make_client.cache_clear()


# ------------------------------------------------------------------ errors


def error_code(error: BaseException) -> str:
    """The server's own word for a refusal; empty for anything else."""
    response = getattr(error, "response", None)  # a broken connection has one as well, which is None
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: no answer, half an answer, or a server that says so."""
    from botocore import exceptions as boto
    from s3transfer.exceptions import RetriesExceededError

    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return error_code(error) in _PASSING or (500 <= status < 600 and status not in (501, 507))
    if isinstance(error, boto.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    passing = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, RetriesExceededError)
    return isinstance(error, (*passing, boto.CredentialRetrievalError, boto.MetadataRetrievalError))


def in_words(error: BaseException, root_uri: str) -> StoreError:
    """What is wrong and what to do; the server's own text is kept."""
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
        return StoreError(f"{root_uri}: the server refused: {error}", advice="Ask `make doctor`.")
    advice = "See that the server runs and that AWS_ENDPOINT_URL is right, then ask `make doctor`."
    return StoreError(f"{root_uri}: the server does not answer ({error})", advice=advice)


# ------------------------------------------------------------------- store


class S3Store:
    """A prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, patience: Patience = PATIENT) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.root_uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._patience = patience

    def _key(self, key: str) -> str:
        checked = check_key(key, self.root_uri)
        return f"{self.prefix}/{checked}" if self.prefix else checked

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(key)}

    def _call(self, call: Callable[[Any], Result]) -> Result:
        """`call(client)`, again and again while the server is away.

        Raises FileNotFoundError for a missing object and StoreError for everything else.
        """
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError

        begin, attempt, renewed = time.monotonic(), 0, False
        while True:
            try:
                return call(s3_client(self._patience))
            except (BotoCoreError, ClientError, S3UploadFailedError, RetriesExceededError) as raised:
                error = raised.__context__ if isinstance(raised, S3UploadFailedError) else raised
                assert error is not None
                if error_code(error) in _ABSENT:
                    raise FileNotFoundError(f"{self.root_uri}: {error}") from error
                if error_code(error) in _KEYS_REFUSED and not renewed:
                    renewed = True
                    _renew_keys()
                    continue
                left = begin + self._patience.outage_seconds - time.monotonic()
                if not is_passing(error) or left <= 0:
                    raise in_words(error, self.root_uri) from error
            pause = min(left, random.uniform(0, min(_LONGEST_PAUSE_SECONDS, 2.0**attempt)))
            attempt += 1
            logger.warning("%s: %s; again in %.1f s, for %.0f s at most", self.root_uri, error, pause, left)
            time.sleep(pause)

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        try:
            return self._call(lambda s3: s3.head_object(**self._at(key))["ContentLength"])
        except FileNotFoundError:
            return None

    def read_bytes(self, key: str) -> bytes:
        # boto3 repeats requests, not the reading of an answer that breaks off; here both are inside
        return self._call(lambda s3: s3.get_object(**self._at(key))["Body"].read())

    def write_bytes(self, key: str, data: bytes) -> None:
        self._call(lambda s3: s3.put_object(**self._at(key), Body=data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        answers_lost = False

        def put(s3: Any) -> bool:
            nonlocal answers_lost
            try:
                s3.put_object(**self._at(key), Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                answers_lost |= error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) > 0
                if error_code(error) in _EXISTS:
                    return False
                raise
            except Exception:
                answers_lost = True
                raise

        # A repeated request may find what the first one made, when only its answer was lost.
        return self._call(put) or (answers_lost and self.read_bytes(key) == data)

    def upload(self, path: Path, key: str) -> None:
        from boto3.s3.transfer import TransferConfig

        # A transfer that fails takes its parts back; one that is killed leaves them to garbage collection.
        config = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8)
        self._call(lambda s3: s3.upload_file(str(path), self.bucket, self._key(key), Config=config))

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)

        def fetch(s3: Any) -> None:
            with open(aside, "wb") as file:
                s3.download_fileobj(self.bucket, self._key(key), file)

        try:
            self._call(fetch)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise

    def list(self, prefix: str) -> Iterator[str]:
        cut = len(self.prefix) + 1 if self.prefix else 0
        for entry in self._entries(self._key(prefix.rstrip("/")) + "/"):
            yield entry["Key"][cut:]

    def listing(self) -> Iterator[Listed]:
        folder = f"{self.prefix}/" if self.prefix else ""
        for entry in self._entries(folder):
            if not entry["Key"].endswith("/"):
                yield Listed(entry["Key"][len(folder) :], entry["Size"], entry["ETag"], entry["LastModified"])

    def _entries(self, folder: str) -> Iterator[dict[str, Any]]:
        place: dict[str, str] = {"Bucket": self.bucket, "Prefix": folder}
        while True:
            page = self._call(lambda s3: s3.list_objects_v2(**place))
            yield from page.get("Contents", ())
            if not page.get("IsTruncated"):
                return
            place["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        def remove(name: str) -> None:
            self._call(lambda s3: s3.delete_object(**self._at(name)))

        remove(key)
        with ThreadPoolExecutor(max_workers=8) as pool:  # not every server knows deletion of many at once
            for _ in pool.map(remove, self.list(key)):
                pass

    def local_path(self, key: str) -> Path | None:
        return None

    def clock(self) -> datetime:
        answer = self._call(lambda s3: s3.list_objects_v2(Bucket=self.bucket, Prefix=self._key("clock"), MaxKeys=1))
        stated = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(stated) if stated else datetime.now(UTC)

    def unfinished(self) -> Iterator[Unfinished]:
        folder = f"{self.prefix}/" if self.prefix else ""
        place: dict[str, str] = {"Bucket": self.bucket, "Prefix": folder}
        while True:
            page = self._call(lambda s3: s3.list_multipart_uploads(**place))
            for upload in page.get("Uploads", ()):
                yield Unfinished(upload["Key"][len(folder) :], upload["Initiated"], upload["UploadId"])
            if not page.get("IsTruncated"):
                return
            place.update(KeyMarker=page["NextKeyMarker"], UploadIdMarker=page["NextUploadIdMarker"])

    def discard(self, upload: Unfinished) -> None:
        try:
            self._call(lambda s3: s3.abort_multipart_upload(**self._at(upload.key), UploadId=upload.id))
        except StoreError as error:
            if error.__cause__ is None or error_code(error.__cause__) != "NoSuchUpload":
                raise
