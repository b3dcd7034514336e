"""A prefix of a bucket on any S3-compatible server as an object store.

Surprising on purpose: an outage is waited out with growing, random pauses, because a stage should survive a restart of
its store; and refused keys are read once more, because they may have been replaced on disk since the process began.
"""

import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from stages.artifacts.s3_client import (
    ABSENT,
    EXISTS,
    KEYS_REFUSED,
    PATIENT,
    Patience,
    StoreError,
    error_code,
    in_words,
    is_transient,
    renew_keys,
    s3_client,
)
from stages.artifacts.store import Listed, Unfinished, check_key, is_key

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PART_BYTES = 16 * 2**20
"""Larger files are uploaded in parts of this size; boto3 enlarges the parts of huge files: 10,000 is the limit."""
_LONGEST_PAUSE_SECONDS = 20.0


class S3Store:
    """The `Store` of a prefix in a bucket."""

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
        """Return `call(client)`, repeated while the server is away.

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
                if error_code(error) in ABSENT:
                    raise FileNotFoundError(f"{self.root_uri}: {error}") from error
                if error_code(error) in KEYS_REFUSED and not renewed:
                    renewed = True
                    renew_keys()
                    continue
                left = begin + self._patience.outage_seconds - time.monotonic()
                if not is_transient(error) or left <= 0:
                    raise in_words(error, self.root_uri) from error
            pause = min(left, random.uniform(0, min(_LONGEST_PAUSE_SECONDS, 2.0**attempt)))
            attempt += 1
            logger.warning("%s: %s; next try in %.1f s, giving up in %.0f s", self.root_uri, error, pause, left)
            time.sleep(pause)

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        try:
            return self._call(lambda s3: s3.head_object(**self._at(key))["ContentLength"])
        except FileNotFoundError:
            return None

    def read_bytes(self, key: str) -> bytes:
        # boto3 repeats the request but not the reading of a body that breaks off; here both are inside the call
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
                if error_code(error) in EXISTS:
                    return False
                raise
            except Exception:
                answers_lost = True
                raise

        # When only the answer to the first request was lost, its repetition finds the object that the first one made.
        return self._call(put) or (answers_lost and self.read_bytes(key) == data)

    def upload(self, path: Path, key: str) -> None:
        from boto3.s3.transfer import TransferConfig

        # A transfer that fails removes its parts; one that is killed leaves them to garbage collection.
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
            if is_key(key := entry["Key"][cut:]):
                yield key

    def listing(self) -> Iterator[Listed]:
        folder = f"{self.prefix}/" if self.prefix else ""
        for entry in self._entries(folder):
            if is_key(key := entry["Key"][len(folder) :]):
                yield Listed(key, entry["Size"], entry["ETag"], entry["LastModified"])

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
        with ThreadPoolExecutor(max_workers=8) as pool:  # not every server can delete many objects in one request
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
                if is_key(key := upload["Key"][len(folder) :]):
                    yield Unfinished(key, upload["Initiated"], upload["UploadId"])
            if not page.get("IsTruncated"):
                return
            place.update(KeyMarker=page["NextKeyMarker"], UploadIdMarker=page["NextUploadIdMarker"])

    def discard(self, upload: Unfinished) -> None:
        try:
            self._call(lambda s3: s3.abort_multipart_upload(**self._at(upload.key), UploadId=upload.id))
        except StoreError as error:
            if error.__cause__ is None or error_code(error.__cause__) != "NoSuchUpload":
                raise
