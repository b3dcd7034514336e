"""The S3 store when things go wrong: on a small server that misbehaves as real ones do, and on real ones over TLS, in
parts and behind a line that is cut."""

import datetime
import hashlib
import http.server
import ipaddress
import json
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store
from stages.artifacts.s3 import PART_BYTES, S3Store
from stages.artifacts.s3_client import HASTY, PATIENT, Patience, StoreError
from stages.config.errors import Category
from tests.chaos.proxy import Proxy
from tests.conftest import enter
from tests.s3 import Certificate, S3Server, s3_server

ENOUGH = Patience(outage_seconds=20, connect_seconds=3, read_seconds=5, tries=1)


class Misbehaving:
    """A server with one bucket. `trouble` is a queue: each request takes one and suffers it; then all goes well."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.trouble: list[str] = []
        self.known_key = "good"
        self.seen: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                trouble = outer.next(self)
                if trouble == "conflict":
                    return self.answer(409, "ConditionalRequestConflict")
                if trouble in ("slow down", "refused", "redirect"):
                    return self.refuse(trouble)
                if self.headers.get("If-None-Match") == "*" and self.path in outer.objects:
                    return self.answer(412, "PreconditionFailed")
                outer.objects[self.path] = body
                if trouble == "answer lost":
                    self.close_connection = True
                    return self.connection.close()
                self.answer(200)

            def do_GET(self) -> None:
                trouble, body = outer.next(self), outer.objects.get(self.path, b"")
                if trouble in ("slow down", "refused", "redirect"):
                    return self.refuse(trouble)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if trouble == "breaks off":
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    return self.connection.close()
                self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.send_response(200 if outer.next(self) == "" else 403)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def refuse(self, trouble: str) -> None:
                status, code = {
                    "slow down": (503, "SlowDown"),
                    "refused": (403, "InvalidAccessKeyId"),
                    "redirect": (301, "PermanentRedirect"),
                }[trouble]
                self.answer(status, code)

            def answer(self, status: int, code: str = "") -> None:
                text = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode() if code else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def next(self, request: http.server.BaseHTTPRequestHandler) -> str:
        key = request.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
        self.seen.append(key)
        if key != self.known_key:
            return "refused"
        return self.trouble.pop(0) if self.trouble else ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Misbehaving]:
    made = Misbehaving()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "good")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_an_answer_that_breaks_off_is_read_again(server: Misbehaving) -> None:
    store = S3Store("bucket", "p", ENOUGH)
    store.write_bytes("key", b"0123456789")
    server.trouble = ["breaks off", "breaks off"]
    assert store.read_bytes("key") == b"0123456789"
    assert server.trouble == []


def test_a_download_that_fails_leaves_nothing_beside_its_target(server: Misbehaving, tmp_path: Path) -> None:
    server.known_key = "another"
    with pytest.raises(StoreError, match=r"access is denied|does not know"):
        S3Store("bucket", "p", HASTY).download("key", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_put_that_was_won_and_whose_answer_was_lost_is_still_won(server: Misbehaving) -> None:
    store = S3Store("bucket", "p", ENOUGH)
    server.trouble = ["answer lost"]
    assert store.put_if_absent("lease", b"mine") is True
    assert store.put_if_absent("lease", b"mine") is False  # nothing was lost this time: somebody made it before
    server.trouble = ["slow down"]
    assert store.put_if_absent("lease", b"another's") is False
    assert server.objects["/bucket/p/lease"] == b"mine"


def test_a_put_that_met_another_is_tried_again_rather_than_lost_by_both(server: Misbehaving) -> None:
    server.trouble = ["conflict", "conflict"]
    assert S3Store("bucket", "p", ENOUGH).put_if_absent("lease", b"mine") is True


def test_a_server_that_asks_for_patience_gets_it_and_one_that_refuses_does_not(server: Misbehaving) -> None:
    store = S3Store("bucket", "p", ENOUGH)
    server.trouble = ["slow down"] * 3
    store.write_bytes("key", b"x")
    server.trouble = ["redirect"] * 3
    begin = time.monotonic()
    with pytest.raises(StoreError, match="the region is wrong") as refused:
        store.write_bytes("key", b"x")
    assert refused.value.category is Category.CONFIG
    assert "AWS_REGION" in refused.value.advice
    assert time.monotonic() - begin < 15  # of the 20 s that it may wait


def test_keys_that_were_replaced_on_disk_are_taken_up_by_a_process_that_runs(
    server: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def hand_out(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")

    hand_out("good")
    store = S3Store("bucket", "p", ENOUGH)
    store.write_bytes("key", b"1")
    server.known_key = "better"
    with pytest.raises(StoreError, match="does not know the access key") as refused:
        store.write_bytes("key", b"2")
    assert refused.value.category is Category.CONFIG
    hand_out("better")
    store.write_bytes("key", b"3")
    assert server.objects["/bucket/p/key"] == b"3"


def test_keys_with_an_end_are_renewed_before_it_comes(
    server: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A credential process stands for every source of short-lived keys: roles of pods and machines, single sign-on."""
    soon = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)).strftime("%Y-%m-%dT%H:%M:%SZ")
    script = tmp_path / "keys"
    answer = {"Version": 1, "SecretAccessKey": "secret", "SessionToken": "token", "Expiration": soon}
    script.write_text(
        f"#!{sys.executable}\nimport json, pathlib\nplace = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "count = int(place.read_text()) + 1 if place.exists() else 1\nplace.write_text(str(count))\n"
        f"print(json.dumps({{**json.loads({json.dumps(json.dumps(answer))}), 'AccessKeyId': f'key-{{count}}'}}))\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    server.known_key = "key-2"  # the first renewal has happened by the first request: the end is near
    store = S3Store("bucket", "p", ENOUGH)
    store.write_bytes("key", b"1")
    assert "key-2" in server.seen
    server.known_key = f"key-{int(server.seen[-1].removeprefix('key-')) + 1}"
    store.write_bytes("key", b"2")
    assert server.objects["/bucket/p/key"] == b"2"


def test_one_client_serves_all_stores_of_a_process_until_the_environment_changes(
    server: Misbehaving, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.artifacts.s3_client import s3_client

    assert s3_client() is s3_client(PATIENT)
    before = s3_client()
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert s3_client() is not before
    assert s3_client().meta.config.s3["addressing_style"] == "path"  # an endpoint of one's own


# ------------------------------------------------------------ real servers


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["when_required", "when_supported"])
def test_a_large_file_goes_up_in_parts_and_comes_back_whole_in_both_checksum_modes(
    every_server: S3Server, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", mode)
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", mode)
    store = open_store(enter(every_server, monkeypatch))
    _there_and_back(store, tmp_path)
    (entry,) = store.listing()
    assert entry.version.strip('"').endswith("-3") or every_server.kind == "swift"  # made of three parts
    assert list(store.unfinished()) == []


def _there_and_back(store, tmp_path: Path) -> None:
    data = hashlib.sha256(b"seed").digest() * (2 * PART_BYTES // 32) + b"the third part"
    (tmp_path / "there").write_bytes(data)
    store.upload(tmp_path / "there", "a/large.bin")
    assert store.size("a/large.bin") == len(data)
    store.download("a/large.bin", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


@pytest.mark.integration
def test_a_full_bucket_is_named_and_takes_more_when_there_is_room(
    every_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(enter(every_server, monkeypatch))
    store.write_bytes("before", b"xx")
    every_server.limit(store.root_uri.removeprefix("s3://"), 1)
    for write in (lambda: store.write_bytes("key", b"xx"), lambda: _there_and_back(store, tmp_path)):
        begin = time.monotonic()
        with pytest.raises(StoreError, match="quota is used up") as refused:
            write()
        assert refused.value.category is Category.INFRASTRUCTURE
        assert "infra gc" in refused.value.advice
        assert time.monotonic() - begin < 30  # no outage that one could wait out
    assert list(store.unfinished()) == []
    every_server.limit(store.root_uri.removeprefix("s3://"), None)
    _there_and_back(store, tmp_path)


@pytest.mark.integration
def test_a_line_that_is_cut_for_seconds_costs_time_and_nothing_else(
    swift_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = enter(swift_server, monkeypatch)
    host, _, port = swift_server.endpoint.removeprefix("http://").partition(":")
    with Proxy(host, int(port)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        store = open_store(uri)
        store.write_bytes("before", b"x")
        proxy.cut()
        threading.Timer(6, proxy.mend).start()
        begin = time.monotonic()
        assert store.put_if_absent("lease", b"mine") is True
        assert time.monotonic() - begin > 5
        proxy.cut()
        threading.Timer(3, proxy.mend).start()
        _there_and_back(store, tmp_path)


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Swift behind a certificate of our own authority."""
    with s3_server("swift", certificate=_certificate(tmp_path_factory.mktemp("certificates"))) as server:
        yield server


def _certificate(folder: Path) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "server")}
    names = {name: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test {name}")]) for name in keys}
    files = {}
    for name in keys:
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["authority"])
            .public_key(keys[name].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "authority", path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
        )
        signed = builder.sign(keys["authority"], hashes.SHA256())
        files[name] = folder / f"{name}.pem"
        files[name].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key = folder / "key.pem"
    key.write_bytes(
        keys["server"].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    return Certificate(authority=files["authority"], certificate=files["server"], key=key)


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["when_required", "when_supported"])
def test_a_server_with_a_certificate_of_ones_own_works_with_the_authority_and_says_so_without(
    tls_server: S3Server, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", mode)
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", mode)
    store = open_store(enter(tls_server, monkeypatch))
    assert store.put_if_absent("lease", b"x") is True
    _there_and_back(store, tmp_path)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    begin = time.monotonic()
    with pytest.raises(StoreError, match="certificate is not trusted") as refused:
        store.read_bytes("lease")
    assert "AWS_CA_BUNDLE" in refused.value.advice
    assert time.monotonic() - begin < 60  # no outage that one waits out, which is 180 s
