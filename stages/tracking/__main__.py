"""`python -m stages.tracking`: deliver to MLflow what the stages of a run could not deliver themselves."""

import argparse
import logging
import os
import sys

from stages.artifacts.addresses import open_store
from stages.config.errors import ConfigError, StageError
from stages.config.text import printable
from stages.tracking.delivery import replay


class _Plain(logging.Formatter):
    """What a spool says is shown to a person and must not move the cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stages.tracking",
        description="Deliver to MLflow what stages of a run could not deliver themselves.",
    )
    parser.add_argument("run_id", help="run id as it is spelled under runs/ in the store")
    parser.add_argument("--store", default=os.environ.get("ARTIFACT_STORE", ""), help="root of the object store")
    options = parser.parse_args(arguments)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(_Plain("%(levelname)-7s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[console])
    try:
        if not options.store:
            raise ConfigError(
                "no store given", advice="Set ARTIFACT_STORE or give --store file:///folder or s3://bucket/prefix."
            )
        return 1 if replay(open_store(options.store), options.run_id) else 0
    except StageError as error:
        sys.stderr.write(printable(f"error: {error.message}\n{error.advice}\n"))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
