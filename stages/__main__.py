"""`python -m stages <config uri>`: one stage, start to manifest. This is the entry point of every Ray job.

Exit codes are the part of the failure contract that survives a lost object store; the rest is in `failure.json`.
"""

import sys

from stages.config.errors import ExitCode
from stages.job.runner import run_stage


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m stages <config uri>\n")
        return ExitCode.CONFIG
    return run_stage(arguments[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
