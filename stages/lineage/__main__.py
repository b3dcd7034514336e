"""`python -m stages.lineage`: ancestors and descendants of a model, an artifact, raw data or a source."""

import argparse
import os
import sys

from stages.artifacts.addresses import open_store
from stages.config.errors import ConfigError, StageError
from stages.config.text import printable
from stages.lineage.graph import Graph, ancestors, descendants
from stages.lineage.tags import is_model
from stages.lineage.views import to_json, to_markdown, to_svg


def resolve_target(target: str) -> str:
    """Return the artifact uri behind `models:/name@alias` or `models:/name/version`; anything else as it is."""
    if not target.startswith("models:/"):
        return target
    from stages.tracking.client import artifact_uri_of_model  # mlflow takes seconds to import and is needed only here

    return artifact_uri_of_model(target)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stages.lineage", description="Where an artifact came from, and what was made from it."
    )
    parser.add_argument("direction", choices=("ancestors", "descendants"))
    parser.add_argument("target", help="artifact uri, models:/name@alias, or (descendants) uri or digest of raw data")
    parser.add_argument("--format", choices=("markdown", "json", "svg"), default="markdown")
    parser.add_argument("--store", default=os.environ.get("ARTIFACT_STORE", ""), help="root of the object store")
    options = parser.parse_args(arguments)
    render = {"markdown": to_markdown, "json": to_json, "svg": to_svg}[options.format]
    try:
        target = resolve_target(options.target)
        if options.direction == "ancestors":
            graph = ancestors([target])
        else:
            graph = descendants(open_store(options.store or _store_of(target)), target)
    except StageError as error:
        return _fail(error)
    sys.stdout.write(render(graph))
    if options.direction == "descendants" and options.format == "markdown":
        try:
            sys.stdout.write(printable(_registered_versions(graph)))
        except StageError as error:
            return _fail(error)
    return 0


def _fail(error: StageError) -> int:
    sys.stderr.write(printable(f"error: {error.message}\n{error.advice}\n"))
    return 2


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
    sys.exit(main(sys.argv[1:]))
