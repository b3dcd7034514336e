"""`python -m stages.lineage`: ancestors and descendants of a model, an artifact, raw data or a source; whether a model
and all that it was made from are as they were published; signatures for what has none.
"""

import argparse
import hashlib
import logging
import os
import sys

from stages.artifacts.addresses import open_store, split_artifact_uri
from stages.artifacts.manifests import MANIFEST, parse_manifest
from stages.config.errors import ConfigError, StageError
from stages.config.request import Manifest, SourceEntry
from stages.config.text import printable
from stages.lineage.graph import Graph, ancestors, descendants
from stages.lineage.signatures import SIGNING_KEY, VERIFY_KEY, Signed, Signer, Verifier
from stages.lineage.tags import is_model
from stages.lineage.verification import Report, signature_of, verify_all
from stages.lineage.verify_views import verify_json, verify_markdown
from stages.lineage.views import to_json, to_markdown, to_svg

INTACT, NOT_INTACT, FAILED = 0, 1, 2
"""Exit codes."""


def resolve_target(target: str) -> str:
    """Return the artifact uri behind `models:/name@alias` or `models:/name/version`; anything else as it is."""
    if not target.startswith("models:/"):
        return target
    from stages.tracking.client import artifact_uri_of_model  # mlflow takes seconds to import and is needed only here

    return artifact_uri_of_model(target)


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        match options.command:
            case "verify":
                return _verify(options)
            case "sign":
                return _sign(options)
            case _:
                return _walk(options)
    except StageError as error:
        return _fail(f"{error.message}\n{error.advice}")
    except OSError as error:  # such as a manifest that this account may not read: it says nothing about the artifact
        return _fail(f"{error}\nThe look itself failed. Make it readable for this account, and run the command again.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stages.lineage",
        description="Where an artifact came from, what was made from it, and whether all of it is as it was published.",
    )
    parser.add_argument("--store", default=os.environ.get("ARTIFACT_STORE", ""), help="root of the object store")
    commands = parser.add_subparsers(dest="command", required=True)
    models = "artifact uri, or models:/name@alias or models:/name/version"
    for name, help_, target in (
        ("ancestors", "what it was made from", models),
        ("descendants", "what was made from it", f"{models}, or uri or digest of raw data"),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("target", help=target)
        command.add_argument("--format", choices=("markdown", "json", "svg"), default="markdown")
        command.add_argument("--store", default=argparse.SUPPRESS, help="root of the object store")
    verify = commands.add_parser(
        "verify", help="hash every file of it and of its ancestors; exit code 1 when something is not as published"
    )
    verify.add_argument("target", help=models)
    verify.add_argument(
        "--key",
        action="append",
        metavar="PUBLIC.pem",
        help=f"public key that must have signed every manifest, repeatable; default: {VERIFY_KEY}",
    )
    verify.add_argument(
        "--sources", action="store_true", help="also read outside sources again, where they are reached"
    )
    verify.add_argument("--format", choices=("markdown", "json"), default="markdown")
    sign = commands.add_parser("sign", help="verify it and its ancestors, then sign what this key has not signed")
    sign.add_argument("target", help=models)
    sign.add_argument("--key", metavar="PRIVATE.pem", help=f"private key; default: {SIGNING_KEY}")
    return parser


def _walk(options: argparse.Namespace) -> int:
    render = {"markdown": to_markdown, "json": to_json, "svg": to_svg}[options.format]
    target = resolve_target(options.target)
    if options.command == "ancestors":
        graph = ancestors([_artifact_address(target)])
    else:
        graph = descendants(open_store(options.store or _store_of(target)), target)
    sys.stdout.write(render(graph))
    if options.command == "descendants" and options.format == "markdown":
        sys.stdout.write(printable(_registered_versions(graph)))
    return 0


def _artifact_address(target: str) -> str:
    """Return the target when it has the form of an address; raises ConfigError for what can name no artifact."""
    if target.startswith("models:/"):
        return target
    root, _, tail = target.rstrip("/").rpartition("/artifacts/")
    parts = tail.split("/")
    if not root or len(parts) != 2 or not all(parts):
        problem = "it does not end in /artifacts/<kind>/<fingerprint>"
    else:
        try:
            open_store(root)
            return target
        except ConfigError as error:
            problem = error.message.replace("ARTIFACT_STORE=", "")
    raise ConfigError(
        f"target={target!r} is no address of an artifact: {problem}; allowed: models:/<name>@<alias>, "
        "models:/<name>/<version>, <store>/artifacts/<kind>/<fingerprint>",
        advice="MLflow shows the address as the tag artifact.uri, and the task in Airflow as a button.",
    )


def _verify(options: argparse.Namespace) -> int:
    paths = options.key or list(filter(None, [os.environ.get(VERIFY_KEY, "")]))
    trusted = [Verifier.from_file(path, field="--key" if options.key else VERIFY_KEY) for path in paths]
    report = _checked(options.target, trusted, read_sources=options.sources)
    sys.stdout.write((verify_json if options.format == "json" else verify_markdown)(report))
    return INTACT if report.is_intact else NOT_INTACT


def _checked(target: str, trusted: list[Verifier], *, read_sources: bool = False) -> Report:
    digest = ""
    uri = _artifact_address(target)
    if target.startswith("models:/"):
        from stages.tracking.client import registered_artifact

        registered = registered_artifact(target)
        uri, digest = registered.uri, registered.digest
    again = _digest_today if read_sources else None
    return verify_all(uri, trusted=trusted, digest=digest, registered_as=target, again=again, progress=_say)


def _digest_today(source: SourceEntry, manifest: Manifest) -> str:
    from stages.config.pipeline import stage_config_from_json
    from stages.job.runner import digest_of  # the job's own way to look at sources

    return digest_of(source, stage_config_from_json(manifest.stage, manifest.config))


def _sign(options: argparse.Namespace) -> int:
    signer = Signer.from_file(options.key) if options.key else Signer.from_environment()
    if signer is None:
        raise ConfigError(
            f"sign needs a private key: neither --key nor {SIGNING_KEY} names one",
            advice="Make one with `openssl genpkey -algorithm ed25519 -out signing.pem` and keep it to yourself.",
        )
    report = _checked(options.target, [])
    if not report.is_intact:
        sys.stdout.write(verify_markdown(report))
        sys.stderr.write("error: nothing was signed: what is damaged must not be vouched for.\n")
        return NOT_INTACT
    verifier = Verifier.of(signer.key.public_key())
    signed = 0
    for one in report.checked:
        store, key = split_artifact_uri(one.uri)
        data = store.read_bytes(f"{key}/{MANIFEST}")
        if hashlib.sha256(data).hexdigest() != one.manifest_sha256:
            raise ConfigError(
                f"{one.uri} was replaced while it was read",
                advice="Run the same command again, which verifies it anew.",
            )
        manifest = parse_manifest(store, key, data)
        # What a signature's file is called proves nothing, and only signing again mends a damaged one.
        if signature_of(store, key, manifest, data, trusted=[verifier]).signed is Signed.VALID:
            continue
        signer.sign(store, manifest, data)
        signed += 1
    sys.stdout.write(
        f"{signed} of {len(report.checked)} artifacts signed by {signer.key_id}; the others were before.\n"
    )
    return 0


def _say(line: str) -> None:
    """Progress of a walk that may take long."""
    sys.stderr.write(f"{printable(line)}\n")


def _fail(error: str) -> int:
    sys.stderr.write(printable(f"error: {error}\n"))
    return FAILED


def _store_of(target: str) -> str:
    root, separator, _ = target.rpartition("/artifacts/")
    if not separator:
        raise ConfigError(
            f"no store to search for {target!r}",
            advice="Set ARTIFACT_STORE or give --store file:///folder or s3://bucket/prefix.",
        )
    return root


def _registered_versions(graph: Graph) -> str:
    """List the registered versions of these models in MLflow, which a takedown must withdraw."""
    models = [node for node in graph.nodes if is_model(node.kind)]
    if not models or not os.environ.get("MLFLOW_TRACKING_URI"):
        return ""
    from stages.tracking.client import registered_versions

    found = registered_versions([node.id for node in models])
    lines = [
        f"- {name} version {version}" + (f" ({', '.join(aliases)})" if aliases else "")
        for name, version, aliases in found
    ]
    return "\nRegistered in MLflow:\n" + ("\n".join(lines) or "- none of them") + "\n"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main(sys.argv[1:]))
