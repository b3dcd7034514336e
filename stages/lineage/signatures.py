"""Signatures over an artifact's manifest and files, for readers who do not trust everyone who may write to the store.

One signature is one object, `signatures/<sha256 of the manifest>-<id of the key>.json` next to the manifest: a DSSE
envelope (github.com/secure-systems-lab/dsse) around an in-toto statement. It is written before the manifest, which
stays last. Its name says what it covers and who signed, so that an attempt that died, or that lost a race, leaves
nothing that could be taken for the signature of another.

Keys are Ed25519, or ECDSA on P-256 or P-384, as PEM files. `cryptography` does it, which Airflow and MLflow bring
anyway. OpenSSF's model-signing 1.1 writes such envelopes, too, but does not import without pyOpenSSL, crashes on
Ed25519 keys, and would hash every file again.
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artifacts.addresses import artifact_key
from stages.artifacts.manifests import MANIFEST, SIGNATURES, canonical_json
from stages.artifacts.store import Store
from stages.config.errors import ConfigError, DataError
from stages.config.records import parse_object
from stages.config.request import Manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
    PublicKey = Ed25519PublicKey | EllipticCurvePublicKey

SIGNING_KEY, VERIFY_KEY = "ATHANOR_SIGNING_KEY", "ATHANOR_VERIFY_KEY"
"""Variables with the path of a PEM file: the private key where stages publish, the public key where others verify."""

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "urn:athanor:artifact:1"
_ALLOWED = "an Ed25519 key, or an EC key on P-256 or P-384, as an unencrypted PEM file"
_MAKE_ONE = (
    "Make one with `openssl genpkey -algorithm ed25519 -out signing.pem`, and its public key with "
    "`openssl pkey -in signing.pem -pubout -out signing.pub.pem`."
)
_CURVES = ("secp256r1", "secp384r1")


class Signed(StrEnum):
    """What the signatures next to a manifest say."""

    VALID = "signed"
    UNCHECKED = "signed, not checked"
    UNSIGNED = "not signed"
    OTHER_KEY = "signed by another key"
    OTHER_MANIFEST = "signed with other content"
    WRONG = "wrong signature"


@dataclass(frozen=True)
class SignatureFinding:
    """Whether a manifest is signed, and by whom."""

    signed: Signed
    keys: tuple[str, ...] = ()
    """Ids of the keys that are named."""


@dataclass(frozen=True)
class Verifier:
    """A public key that is trusted."""

    key: "PublicKey"
    key_id: str

    @staticmethod
    def from_file(path: str, *, field: str = "--key") -> "Verifier":
        """Read a public key; raises ConfigError when the file is none."""
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        data = _read(path, field)
        if b"PRIVATE KEY" in data:
            raise ConfigError(
                f"{field}={path} holds a private key; expected a public one",
                advice="Keep the private key where stages publish. Write its public key with `openssl pkey -in "
                "signing.pem -pubout -out signing.pub.pem`.",
            )
        return Verifier.of(_loaded(load_pem_public_key, data, path, field))

    @staticmethod
    def of(key: Any) -> "Verifier":
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return Verifier(key, hashlib.sha256(der).hexdigest())

    def accepts(self, signature: bytes, data: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
        from cryptography.hazmat.primitives.hashes import SHA256

        try:
            if isinstance(self.key, EllipticCurvePublicKey):
                self.key.verify(signature, data, ECDSA(SHA256()))
            else:
                self.key.verify(signature, data)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class Signer:
    """A private key that signs what is published."""

    key: "PrivateKey"
    key_id: str

    @staticmethod
    def from_environment() -> "Signer | None":
        """The signer that ATHANOR_SIGNING_KEY names, None when it is not set; ConfigError for a file that is no key, so
        call this before the work and not after it."""
        path = os.environ.get(SIGNING_KEY, "")
        return Signer.from_file(path, field=SIGNING_KEY) if path else None

    @staticmethod
    def from_file(path: str, *, field: str = "--key") -> "Signer":
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        key = _loaded(lambda data: load_pem_private_key(data, password=None), _read(path, field), path, field)
        return Signer(key, Verifier.of(key.public_key()).key_id)

    def sign(self, store: Store, manifest: Manifest, manifest_data: bytes) -> str:
        """Write the signature over a manifest, as it is or will be stored, and over the files that it lists; return its
        key. Doing it again changes nothing that counts."""
        payload = canonical_json(_statement(manifest, manifest_data))
        signature = self._signature(pre_authentication_encoding(PAYLOAD_TYPE, payload))
        envelope = {
            "payloadType": PAYLOAD_TYPE,
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"keyid": self.key_id, "sig": base64.b64encode(signature).decode()}],
        }
        key = f"{artifact_key(manifest.kind, manifest.fingerprint)}/{_name(manifest_data, self.key_id)}"
        store.write_bytes(key, json.dumps(envelope, indent=1).encode())
        return key

    def _signature(self, data: bytes) -> bytes:
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.hashes import SHA256

        if isinstance(self.key, EllipticCurvePrivateKey):
            return self.key.sign(data, ECDSA(SHA256()))
        return self.key.sign(data)


def check_signature(
    store: Store, key: str, manifest: Manifest, manifest_data: bytes, *, trusted: Iterable[Verifier]
) -> SignatureFinding:
    """Say whether one of the trusted keys signed this manifest; without trusted keys, who claims to have."""
    trusted = list(trusted)
    covered = hashlib.sha256(manifest_data).hexdigest()
    # Those of a folder in it are no signatures: they are not where a signature is read.
    listed = (name.removeprefix(f"{key}/{SIGNATURES}/") for name in store.list(f"{key}/{SIGNATURES}"))
    names = [name for name in listed if name.endswith(".json") and "/" not in name]
    claims = [name.removesuffix(".json").partition("-") for name in names]
    ours = tuple(sorted(key_id for digest, _, key_id in claims if digest == covered))
    if not trusted:
        return SignatureFinding(Signed.UNCHECKED if ours else Signed.UNSIGNED, ours)
    wrong = False
    for verifier in trusted:
        if verifier.key_id in ours:
            data = store.read_bytes(f"{key}/{_name(manifest_data, verifier.key_id)}")
            if _covers(data, verifier, manifest, manifest_data):
                return SignatureFinding(Signed.VALID, (verifier.key_id,))
            wrong = True
    if wrong:
        return SignatureFinding(Signed.WRONG, ours)
    if ours:
        return SignatureFinding(Signed.OTHER_KEY, ours)
    others = tuple(sorted({key_id for _, _, key_id in claims}))
    return SignatureFinding(Signed.OTHER_MANIFEST if others else Signed.UNSIGNED, others)


def _covers(data: bytes, verifier: Verifier, manifest: Manifest, manifest_data: bytes) -> bool:
    """Whether an envelope holds this key's signature over the statement that this manifest and its files make."""
    try:
        envelope = parse_object(data, "the signature")
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(entry["sig"], validate=True) for entry in envelope["signatures"]]
        signed = pre_authentication_encoding(str(envelope["payloadType"]), payload)
    except (DataError, KeyError, TypeError, ValueError, binascii.Error):
        return False
    # The statement is compared whole, so that a signature over anything else, also by this key, proves nothing here.
    return (
        envelope["payloadType"] == PAYLOAD_TYPE
        and payload == canonical_json(_statement(manifest, manifest_data))
        and any(verifier.accepts(signature, signed) for signature in signatures)
    )


def _statement(manifest: Manifest, manifest_data: bytes) -> dict[str, Any]:
    """An in-toto statement: the manifest and each file by digest, which tools without Athanor can check."""
    files = {entry.path: entry.sha256 for entry in manifest.files}
    files[MANIFEST] = hashlib.sha256(manifest_data).hexdigest()
    return {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": _PREDICATE,
        "predicate": {
            "kind": manifest.kind,
            "stage": manifest.stage.value,
            "fingerprint": manifest.fingerprint,
            "digest": manifest.digest,
        },
    }


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What DSSE signs: type and payload with their lengths, so that neither can be taken for part of the other."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _name(manifest_data: bytes, key_id: str) -> str:
    return f"{SIGNATURES}/{hashlib.sha256(manifest_data).hexdigest()}-{key_id}.json"


def _read(path: str, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{field}={path} cannot be read: {error.strerror}; expected {_ALLOWED}",
            advice=f"Put the file where this process can read it, or unset {field}. {_MAKE_ONE}",
        ) from None


def _loaded(load: Any, data: bytes, path: str, field: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    try:
        key = load(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise ConfigError(f"{field}={path} is not {_ALLOWED}: {error}", advice=_MAKE_ONE) from None
    is_curve = isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    if not is_curve and not isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        raise ConfigError(f"{field}={path} is a key of another kind; allowed: {_ALLOWED}", advice=_MAKE_ONE)
    return key
