"""Tests what an artifact store can do by doing it; `make doctor` prints the findings.

Every check leaves the store as it was. Whether an object is created only once is tested by a race of writers, because
some servers first look and then write, and so let several writers win.
"""

from __future__ import annotations

import shutil
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from stages.artifacts.addresses import open_store
from stages.artifacts.folder import FileStore
from stages.artifacts.s3 import S3Store
from stages.artifacts.s3_client import HASTY, Patience, in_words, s3_client
from stages.artifacts.store import Store
from stages.config.errors import StageError
from stages.config.text import byte_size

RACERS, ROUNDS = 8, 10
SKEW_NOTED_SECONDS, SKEW_REFUSED_SECONDS = 60, 900
SLOW_SECONDS = 1.0
LITTLE_ROOM_BYTES = 5 * 2**30
FORGOTTEN_SECONDS = 86_400
STEADY = Patience(outage_seconds=10, connect_seconds=3, read_seconds=10, tries=1)
"""For use after the first answer of the server: writers in a race may be told to try again."""
_PART = 5 * 2**20  # the least that S3 takes for any part but the last
_RIGHTS = "Give the key the rights that docs/DEPLOY.md lists."
_FAILURES = (StageError, OSError)


class Verdict(Enum):
    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"
    NOT_ASKED = "not asked"


class Finding(NamedTuple):
    """One thing that was looked at."""

    verdict: Verdict
    subject: str
    what: str
    advice: str = ""


def ok(subject: str, what: str) -> Finding:
    return Finding(Verdict.OK, subject, what)


def warning(subject: str, what: str, advice: str) -> Finding:
    return Finding(Verdict.WARNING, subject, what, advice)


def wrong(subject: str, what: str, advice: str) -> Finding:
    return Finding(Verdict.WRONG, subject, what, advice)


def examine(uri: str) -> Iterator[Finding]:
    """All findings about the store; each check may rely on those before it."""
    try:
        store = open_store(uri)
        if isinstance(store, S3Store):
            store = S3Store(store.bucket, store.prefix, HASTY)
            skew = _skew(store)
            store = S3Store(store.bucket, store.prefix, STEADY)
        else:
            store.write_bytes(key := f"probe/{uuid.uuid4().hex}", b"")
            store.delete(key)
            skew = None
    except _FAILURES as error:
        yield _failed("store", error)
        return
    yield ok("store", f"{uri} answers")
    if skew is not None:
        yield _clock(skew)
    folder = f"probe/{uuid.uuid4().hex}"
    try:
        if isinstance(store, S3Store):
            yield from _rights(store, folder)
            yield from _checksums(store, folder)
        elif isinstance(store, FileStore):
            yield _room(store.root)
        yield from _created_once(store, folder)
        yield _speed(store, folder)
        yield _forgotten(store)
    except _FAILURES as error:
        yield _failed("store", error)
    finally:
        _clean(store, folder)


def _failed(subject: str, error: BaseException) -> Finding:
    if isinstance(error, StageError):
        return wrong(subject, error.message, error.advice)
    advice = "See that the folder exists, belongs to this user and can be written." if subject == "store" else ""
    return wrong(subject, f"{type(error).__name__}: {error}", advice)


def _clean(store: Store, folder: str) -> None:
    """Delete the probe's objects; an error here is ignored because the findings have it already."""
    try:
        store.delete(folder)
    except _FAILURES:
        pass


def _skew(store: S3Store) -> float:
    """By how many seconds the server's clock is ahead of ours; the first call to the server."""
    before = datetime.now(UTC)
    there = store.clock()
    middle = before + (datetime.now(UTC) - before) / 2
    return (there - middle).total_seconds()


def _clock(skew: float) -> Finding:
    words = f"the server's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    if abs(skew) >= SKEW_REFUSED_SECONDS:
        return wrong("clock", words, "Set this machine's clock, best by NTP: S3 refuses what differs by 15 minutes.")
    if abs(skew) >= SKEW_NOTED_SECONDS:
        return warning("clock", words, "Set this machine's clock, best by NTP: S3 refuses 15 minutes.")
    return ok("clock", f"within {max(1.0, abs(skew)):.0f} s of the server's")


def _rights(store: S3Store, folder: str) -> Iterator[Finding]:
    """Try each right by itself: a policy that lacks one fails hours into a run."""
    missing: list[str] = []
    for right, attempt in (
        ("put", lambda: store.write_bytes(f"{folder}/right", b"x")),
        ("get", lambda: store.read_bytes(f"{folder}/right")),
        ("list", lambda: list(store.list(folder))),
        ("delete", lambda: store.delete(f"{folder}/right")),
        ("multipart upload", lambda: _in_parts(store, f"{folder}/parts")),
        ("list and abort multipart uploads", lambda: _begun_and_given_up(store, f"{folder}/given-up")),
    ):
        try:
            attempt()
        except _FAILURES as error:
            missing.append(right)
            yield _failed(f"right: {right}", error)
    if not missing:
        yield ok("rights", "put, get, list, delete, multipart upload, abort")


def _asked(store: S3Store, call: Callable[[Any], Any]) -> Any:
    """`call(client)` at once and without a second try, with errors in words."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return call(s3_client(HASTY))
    except (BotoCoreError, ClientError) as error:
        raise in_words(error, store.root_uri) from error


def _in_parts(store: S3Store, key: str) -> None:
    place = {"Bucket": store.bucket, "Key": f"{store.prefix}/{key}".lstrip("/")}
    parts = [b"a" * _PART, b"b"]
    begun = _asked(store, lambda s3: s3.create_multipart_upload(**place))["UploadId"]
    tags = [
        _asked(store, lambda s3, n=n, part=part: s3.upload_part(**place, UploadId=begun, PartNumber=n, Body=part))
        for n, part in enumerate(parts, start=1)
    ]
    listed = {"Parts": [{"PartNumber": n, "ETag": tag["ETag"]} for n, tag in enumerate(tags, start=1)]}
    _asked(store, lambda s3: s3.complete_multipart_upload(**place, UploadId=begun, MultipartUpload=listed))
    if store.read_bytes(key) != b"".join(parts):
        raise StageError("an object that went up in parts came back different", advice="Do not use this server.")


def _begun_and_given_up(store: S3Store, key: str) -> None:
    place = {"Bucket": store.bucket, "Key": f"{store.prefix}/{key}".lstrip("/")}
    _asked(store, lambda s3: s3.create_multipart_upload(**place))
    mine = [upload for upload in store.unfinished() if upload.key == key]
    if not mine:
        raise StageError("a multipart upload that was begun is not listed", advice=_RIGHTS)
    for upload in mine:
        store.discard(upload)
    if any(upload.key == key for upload in store.unfinished()):
        raise StageError("a multipart upload that was aborted is still listed", advice=_RIGHTS)


def _checksums(store: S3Store, folder: str) -> Iterator[Finding]:
    """Try both checksum modes of boto3, and whether the server notices a wrong checksum."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    place = {"Bucket": store.bucket, "Key": f"{store.prefix}/{folder}/checksum".lstrip("/")}
    style = s3_client(HASTY).meta.config.s3
    broken: dict[str, str] = {}
    for mode in ("when_required", "when_supported"):
        config = Config(
            connect_timeout=HASTY.connect_seconds,
            read_timeout=HASTY.read_seconds,
            s3=style,
            request_checksum_calculation=mode,
            response_checksum_validation=mode,
        )
        client = boto3.Session().client("s3", config=config)
        try:
            client.put_object(**place, Body=mode.encode())
            if client.get_object(**place)["Body"].read() != mode.encode():
                broken[mode] = "what came back is not what was sent"
        except (BotoCoreError, ClientError) as error:
            broken[mode] = str(error)
    chosen = s3_client(HASTY).meta.config.request_checksum_calculation
    for mode, why in broken.items():
        words = f"AWS_REQUEST_CHECKSUM_CALCULATION={mode} does not work here: {why}"
        if mode == chosen:
            other = "when_required" if mode == "when_supported" else "when_supported"
            yield wrong("checksums", words, f"Set AWS_REQUEST_CHECKSUM_CALCULATION={other}.")
        else:
            yield ok("checksums", f"{words}; {chosen}, which is set, does")
    noticed = _notices_a_wrong_checksum(place)
    told = "refuses data with a wrong CRC32" if noticed else "ignores CRC32; the SHA-256 in our manifests protects"
    yield ok("checksums", f"{' and '.join(m for m in ('when_required', 'when_supported') if m not in broken)}; {told}")


def _notices_a_wrong_checksum(place: dict[str, str]) -> bool:
    from botocore.exceptions import ClientError

    try:
        s3_client(HASTY).put_object(**place, Body=b"data", ChecksumCRC32="AAAAAA==")
    except ClientError:
        return True
    return False


def _created_once(store: Store, folder: str) -> Iterator[Finding]:
    subject = "put if absent"
    key = f"{folder}/once"
    made, again = store.put_if_absent(key, b"first"), store.put_if_absent(key, b"second")
    if not made or again or store.read_bytes(key) != b"first":
        advice = "Use another server: on this one two builders overwrite each other's work."
        yield wrong(subject, "the store overwrites what exists (it ignores If-None-Match)", advice)
        return
    winners = [_race(store, f"{folder}/race-{number}") for number in range(ROUNDS)]
    if winners == [1] * ROUNDS:
        yield ok(subject, f"atomic: one winner in each of {ROUNDS} races of {RACERS} writers")
        return
    yield warning(
        subject,
        f"not atomic: {min(winners)} to {max(winners)} of {RACERS} writers won (the server looks, then writes)",
        "Works: two runs that need the same artifact at the same moment may both begin to build it, and the lease "
        "stops all but the last. A server with atomic conditional writes avoids the work done twice.",
    )


def _race(store: Store, key: str) -> int:
    start = threading.Barrier(RACERS)

    def write(number: int) -> bool:
        start.wait()
        return store.put_if_absent(key, str(number).encode())

    with ThreadPoolExecutor(max_workers=RACERS) as pool:
        return sum(pool.map(write, range(RACERS)))


def _speed(store: Store, folder: str) -> Finding:
    puts, gets = [], []
    for number in range(10):
        puts.append(_seconds(lambda n=number: store.write_bytes(f"{folder}/small-{n}", b"x" * 1024)))
        gets.append(_seconds(lambda n=number: store.read_bytes(f"{folder}/small-{n}")))
    data = bytes(8 * 2**20)
    large = _seconds(lambda: store.write_bytes(f"{folder}/large", data))
    put, get = statistics.median(puts), statistics.median(gets)
    words = f"1 KB: put {put * 1000:.0f} ms, get {get * 1000:.0f} ms; 8 MiB: {8 / large:.0f} MiB/s"
    if max(put, get) > SLOW_SECONDS:
        return warning("speed", words, "Leases and progress write small objects every 10 s: use a nearer server.")
    return ok("speed", words)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _room(root: Path) -> Finding:
    free = shutil.disk_usage(root).free
    words = f"{byte_size(free)} free"
    if free < LITTLE_ROOM_BYTES:
        return warning("room", words, "Make room: `python -m infra gc` lists what nothing needs.")
    return ok("room", words)


def _forgotten(store: Store) -> Finding:
    now = store.clock()
    old = [upload for upload in store.unfinished() if (now - upload.started).total_seconds() > FORGOTTEN_SECONDS]
    if old:
        return warning("uploads", f"{len(old)} began over a day ago and never ended", "Run `python -m infra gc`.")
    return ok("uploads", "none was left half-way")
