"""`make audit`: known vulnerabilities of the installed packages, asked of PyPI's advisory service by pip-audit.

pip-audit alone is not enough: where an index knows a package but has no advisories (most mirrors), it says "no known
vulnerabilities found" and succeeds. Here, packages that were not audited are a failure of their own, exit status 2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PIP_AUDIT = "pip-audit==2.10.1"
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Audit:
    """The result of an audit."""

    vulnerable: tuple[str, ...]
    unaudited: tuple[str, ...]
    audited: int

    @property
    def status(self) -> int:
        return VULNERABLE if self.vulnerable else UNKNOWN if self.unaudited or not self.audited else CLEAN


def installed() -> list[str]:
    """`name==version` of the installed packages, without this checkout and without build tags such as `+cpu`."""
    freeze = ["uv", "pip", "freeze", "--python", sys.executable, "--exclude-editable"]
    lines = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.partition("+")[0] for line in lines if "==" in line]


def ask(requirements: Sequence[str]) -> tuple[str, str]:
    """Return pip-audit's standard output, which is JSON, and its standard error."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "requirements.txt"
        file.write_text("\n".join(requirements) + "\n")
        tool = ("uv", "tool", "run", "--from", PIP_AUDIT, "pip-audit", "--format", "json", "--progress-spinner", "off")
        exactly = ("--no-deps", "--disable-pip", "--requirement", str(file))
        done = subprocess.run([*tool, *exactly], capture_output=True, text=True, check=False)
    return done.stdout, done.stderr


def read(answer: str) -> Audit:
    """Read pip-audit's JSON; raises ValueError when there is none."""
    vulnerable, unaudited, audited = [], [], 0
    for package in json.loads(answer)["dependencies"]:
        if why := package.get("skip_reason"):
            unaudited.append(f"{package['name']}: {why}")
            continue
        audited += 1
        for found in package["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no release yet"
            vulnerable.append(f"{package['name']} {package['version']}: {found['id']}, mended in {mended}")
    return Audit(tuple(vulnerable), tuple(unaudited), audited)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.audit", description=__doc__)
    parser.add_argument("requirement", nargs="*", help="name==version; everything that is installed when there is none")
    requirements = parser.parse_args().requirement or installed()
    answer, complaints = ask(requirements)
    try:
        audit = read(answer)
    except ValueError:
        last = complaints.strip().splitlines()[-1:] or ["no answer"]
        print(
            f"NOT AUDITED: pip-audit reached no advisory service, is this machine offline?\n  {last[0]}",
            file=sys.stderr,
        )
        return UNKNOWN
    for line in audit.vulnerable:
        print(f"vulnerable  {line}")
    if audit.unaudited:
        print(
            f"NOT AUDITED: {len(audit.unaudited)} of {len(requirements)} packages, for the index has no advisories of"
        )
        print("\n".join(f"  {line}" for line in audit.unaudited[:5]))
    print(f"{audit.audited} packages audited, {len(audit.vulnerable)} vulnerabilities known")
    return audit.status


if __name__ == "__main__":
    sys.exit(main())
