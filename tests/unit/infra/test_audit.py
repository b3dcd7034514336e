"""An audit that looked at nothing is no clean one."""

import json

import pytest

from infra.audit import CLEAN, UNKNOWN, VULNERABLE, installed, read

# as pip-audit 2.10.1 answers
WELL = {"name": "rich", "version": "14.0.0", "vulns": []}
ILL = {
    "name": "jinja2",
    "version": "3.1.2",
    "vulns": [{"id": "PYSEC-2024-1", "fix_versions": ["3.1.3"], "aliases": [], "description": ""}],
}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


@pytest.mark.parametrize(
    ("packages", "status"),
    [
        ([WELL], CLEAN),
        ([WELL, ILL], VULNERABLE),
        ([SKIPPED], UNKNOWN),
        ([WELL, SKIPPED], UNKNOWN),
        ([ILL, SKIPPED], VULNERABLE),
        ([], UNKNOWN),
    ],
)
def test_only_what_was_looked_at_counts(packages: list[dict], status: int) -> None:
    assert read(json.dumps({"dependencies": packages, "fixes": []})).status == status


def test_a_vulnerability_is_named_with_its_remedy() -> None:
    assert read(json.dumps({"dependencies": [ILL]})).vulnerable == ("jinja2 3.1.2: PYSEC-2024-1, mended in 3.1.3",)


def test_an_answer_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        read("")


def test_everything_that_is_installed_is_asked_about_by_its_release() -> None:
    found = dict(line.split("==") for line in installed())
    assert {"torch", "apache-airflow", "ray", "mlflow"} <= found.keys()
    assert not [version for version in found.values() if "+" in version]
    assert "athanor" not in found
