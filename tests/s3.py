"""Real S3 servers for tests: Ceph's RADOS gateway when its Debian packages are installed (ceph-mon, ceph-osd,
radosgw, ceph-common), and OpenStack Swift with s3api. ATHANOR_TEST_S3=ceph|swift says which one serves tests that need
any; those that need both take both.

They differ where clients get it wrong. Ceph creates-if-absent atomically and ignores CRC32 headers; Swift checks CRC32
and its create-if-absent is check-then-write."""

from __future__ import annotations

import os
import secrets
import shutil
import ssl
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from infra.ports import any_free
from tests.servers import ServerError, running

CEPH_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
REGION = "us-east-1"


@dataclass(frozen=True)
class Certificate:
    """Of a server on 127.0.0.1, signed by an authority of our own."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class S3Server:
    """An S3 endpoint with one user's keys."""

    kind: str
    endpoint: str
    access_key: str
    secret_key: str
    authority: Path | None = None
    config: Path | None = None
    """For administrators' commands."""

    @property
    def environment(self) -> dict[str, str]:
        """The standard AWS variables, as a user would export them."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            **({"AWS_CA_BUNDLE": str(self.authority)} if self.authority else {}),
        }

    def new_bucket(self, prefix: str = "athanor") -> str:
        """Create an empty bucket and return its name."""
        import boto3
        from botocore.config import Config

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            verify=str(self.authority) if self.authority else None,
            config=Config(s3={"addressing_style": "path"}),
        )
        name = f"{prefix}-{uuid.uuid4().hex[:8]}"
        client.create_bucket(Bucket=name)
        return name

    def limit(self, bucket: str, max_bytes: int | None) -> None:
        """Give a bucket a quota, or take it away."""
        assert self.config
        if self.kind == "swift":
            _call(sys.executable, "-c", SWIFT_QUOTA, self.config, "AUTH_ci", bucket, str(max_bytes or ""))
            return
        quota = ("radosgw-admin", "-c", self.config, "--quota-scope", "bucket", "--bucket", bucket, "quota")
        _call(*quota, "set", "--max-size", str(max_bytes or -1))
        _call(*quota, "enable" if max_bytes else "disable")


def missing_of_ceph() -> list[str]:
    """Programs of Ceph that are not on PATH."""
    return [program for program in CEPH_PROGRAMS if not shutil.which(program)]


def best_kind() -> str:
    """The better real server of those that this machine has."""
    return os.environ.get("ATHANOR_TEST_S3", "swift" if missing_of_ceph() else "ceph")


@contextmanager
def s3_server(kind: str, *, certificate: Certificate | None = None, address: str = "127.0.0.1") -> Iterator[S3Server]:
    """A real S3 server in a directory of its own, which clients reach at `address`; Swift alone speaks TLS, with
    `certificate`."""
    root = Path(tempfile.mkdtemp(prefix="ath-s3-", dir="/tmp"))  # Unix sockets need a short path
    try:
        match kind:
            case "ceph" if missing := missing_of_ceph():
                raise ServerError(f"Ceph was asked for, but not on PATH: {', '.join(missing)}")
            case "ceph":
                with _ceph(root, address) as server:
                    yield server
            case "swift":
                with _swift(root, certificate, address) as server:
                    yield server
            case _:
                raise ServerError(f"S3 server {kind!r} is not one of ceph, swift")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _listens(endpoint: str, authority: Path | None = None) -> bool:
    """Any HTTP answer counts: without a signature an S3 server refuses, which shows that it is there."""
    trusted = ssl.create_default_context(cafile=authority)
    return httpx.get(endpoint, timeout=2, trust_env=False, verify=trusted).status_code < 500


def _call(*command: str | Path, feed: str | None = None, seconds: float = 60) -> str:
    """Run a helper program; every Ceph command blocks for ever when its monitor is away, hence the limit."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            input=feed or "",
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ServerError(f"{command[0]} did not answer within {seconds:.0f} s") from None
    if done.returncode:
        raise ServerError(f"{' '.join(map(str, command[:4]))} failed: {(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout


# ------------------------------------------------------------------ Ceph

# cephx stays on: the gateway hangs without it. The OSD's keyring is its own: a global one breaks its mkfs.
# tcp_nodelay: small reads cost 46 ms each without it.
CEPH_CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
keyring = {root}/keyring
run dir = {root}/run
admin socket = {root}/run/$name.asok
log file = {root}/log/$name.log
crash dir = {root}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 1000
osd crush chooseleaf type = 0
mon data avail crit = 1
mon data avail warn = 2
auth allow insecure global id reclaim = false
[mon]
mon data = {root}/mon/$id
mon initial members = a
[osd]
osd data = {root}/osd/$id
keyring = {root}/osd/$id/keyring
osd objectstore = bluestore
bluestore block size = 10737418240
bluestore block create = true
osd memory target = 939524096
[client]
rgw frontends = beast endpoint={address}:{port} tcp_nodelay=1
rgw data = {root}/rgw
rgw thread pool size = 64
rgw bucket quota ttl = 0
"""


@contextmanager
def _ceph(root: Path, address: str) -> Iterator[S3Server]:
    """One monitor, one OSD on a sparse file and a gateway, all in the foreground; about 16 s."""
    for directory in ("mon", "osd/0", "run", "log", "rgw"):
        (root / directory).mkdir(parents=True)
    config, port, mon_port = root / "ceph.conf", any_free(), any_free()
    fsid, keyring = str(uuid.uuid4()), root / "keyring"
    config.write_text(CEPH_CONFIG.format(fsid=fsid, root=root, port=port, mon_port=mon_port, address=address))
    ceph = ("ceph", "-c", config, "--connect-timeout", "5")
    caps = [word for service in ("mon", "osd", "mgr", "mds") for word in ("--cap", service, "allow *")]
    _call("ceph-authtool", "-C", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    _call("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *caps)
    monmap = root / "monmap"
    _call("monmaptool", "--create", "--clobber", "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", "--fsid", fsid, monmap)
    _call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring, "-c", config)

    def ceph_says(expected: str, *words: str) -> bool:
        try:
            return expected in _call(*ceph, *words, seconds=15)
        except ServerError:
            return False  # the monitor is not there yet; the caller's deadline bounds the wait

    with ExitStack() as stack:

        def daemon(name: str, *command: str | Path, answers) -> None:
            words = [str(word) for word in (*command, "-c", config)]
            stack.enter_context(running(name, words, log=root / "log" / f"{name}.out", environment={}, answers=answers))

        daemon("mon", "ceph-mon", "-f", "-i", "a", answers=lambda: ceph_says("quorum", "mon", "stat"))
        key = _call("ceph-authtool", "--gen-print-key").strip()
        osd = str(uuid.uuid4())
        _call(*ceph, "osd", "new", osd, "0", "-i", "-", feed=f'{{"cephx_secret":"{key}"}}')
        _call("ceph-authtool", "-C", root / "osd/0/keyring", "--name", "osd.0", "--add-key", key)
        _call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "-c", config)
        caps = ("mon", "allow rw", "osd", "allow rwx")
        _call(*ceph, "auth", "get-or-create", "client.rgw.a", *caps, "-o", root / "rgw/keyring")
        daemon("osd", "ceph-osd", "-f", "-i", "0", answers=lambda: ceph_says("1 up", "osd", "stat"))
        endpoint = f"http://{address}:{port}"
        gateway = ("radosgw", "-f", "-n", "client.rgw.a", "-k", root / "rgw/keyring")
        daemon("rgw", *gateway, answers=lambda: _listens(endpoint))
        secret = secrets.token_hex(16)
        user = ("--uid", "ci", "--display-name", "ci", "--access-key", "ci", "--secret-key", secret)
        _call("radosgw-admin", "-c", config, "user", "create", *user)
        yield S3Server("ceph", endpoint, "ci", secret, config=config)


# ----------------------------------------------------------------- Swift

SWIFT_RING = """
import sys
from swift.common.ring import RingBuilder
root, ports = sys.argv[1], map(int, sys.argv[2:])
for name, port in zip(("account", "container", "object"), ports):
    builder = RingBuilder(4, 1, 0)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1.0,
                     "replication_ip": "127.0.0.1", "replication_port": port, "meta": ""})
    builder.rebalance()
    builder.get_ring().save(f"{root}/{name}.ring.gz")
"""

# As an operator of the cloud: users cannot log in here, for their tokens would need a memcached.
SWIFT_QUOTA = """
import os, sys
from swift.common.internal_client import InternalClient
from swift.common.utils import set_swift_dir
config, account, bucket, max_bytes = sys.argv[1:]
set_swift_dir(os.path.dirname(config))
client = InternalClient(config, "quota", 1)
for container in (bucket, bucket + "+segments"):  # where the parts of large objects lie
    client.create_container(account, container)
    client.set_container_metadata(account, container, {"X-Container-Meta-Quota-Bytes": max_bytes})
"""

SWIFT_COMMON = """
[DEFAULT]
bind_ip = {address}
bind_port = {port}
user = {user}
swift_dir = {root}
devices = {root}/srv
mount_check = false
disable_fallocate = true
workers = 0
log_name = {name}
"""

SWIFT_STORAGE = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

SWIFT_PROXY = """
[pipeline:main]
pipeline = {pipeline}
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:tempauth]
use = egg:swift#tempauth
user_ci_ci = {secret} .admin
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = {region}
"""

SWIFT_INTERNAL = """
[DEFAULT]
swift_dir = {root}
[pipeline:main]
pipeline = catch_errors proxy-server
[filter:catch_errors]
use = egg:swift#catch_errors
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""

SWIFT_FILTERS = (
    "catch_errors gatekeeper healthcheck listing_formats bulk s3api tempauth copy container_quotas slo dlo "
    "versioned_writes symlink"
)


@contextmanager
def _swift(root: Path, certificate: Certificate | None, address: str) -> Iterator[S3Server]:
    """Account, container, object and proxy server in the foreground; about 3 s, no root needed."""
    (root / "srv" / "d1").mkdir(parents=True)
    (root / "swift.conf").write_text(f"[swift-hash]\nswift_hash_path_suffix = {secrets.token_hex(8)}\n")
    ports = {name: any_free() for name in ("account", "container", "object", "proxy")}
    storage = [str(port) for name, port in ports.items() if name != "proxy"]
    _call(sys.executable, "-c", SWIFT_RING, root, *storage)
    secret = secrets.token_hex(16)
    filters = "".join(
        f"[filter:{name}]\nuse = egg:swift#{name}\n"
        for name in SWIFT_FILTERS.split()
        if name not in ("tempauth", "s3api")
    )
    user, internal = _user(), root / "internal.conf"
    internal.write_text(SWIFT_INTERNAL.format(root=root))
    with ExitStack() as stack:
        for name, port in ports.items():
            host = address if name == "proxy" else "127.0.0.1"
            text = SWIFT_COMMON.format(address=host, port=port, root=root, name=name, user=user)
            if name == "proxy":
                pipeline = f"{SWIFT_FILTERS} proxy-server"
                if certificate:
                    text += f"cert_file = {certificate.certificate}\nkey_file = {certificate.key}\n"
                text += SWIFT_PROXY.format(pipeline=pipeline, secret=secret, region=REGION) + filters
            else:
                text += SWIFT_STORAGE.format(name=name)
            config = root / f"{name}.conf"
            config.write_text(text)
            program = str(Path(sys.executable).parent / f"swift-{name}-server")
            authority = certificate.authority if certificate and name == "proxy" else None
            url = f"{'https' if authority else 'http'}://{host}:{port}"
            server = running(
                name,
                [program, str(config)],
                log=root / f"{name}.log",
                environment={},
                answers=partial(_listens, f"{url}/healthcheck", authority),
            )
            stack.enter_context(server)
        yield S3Server("swift", url, "ci:ci", secret, authority, internal)  # the proxy is the last


def _user() -> str:
    """Swift drops to this user; it must exist and may be ourselves."""
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
