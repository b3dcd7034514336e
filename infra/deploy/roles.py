"""The role `Rater` in Airflow: sees runs and open questions, answers them, and can do nothing else."""

from __future__ import annotations

QUESTIONS = "HITL Detail"
"""FAB's name for what asks people: ratings and approvals."""

_SEEN = (
    *("Website", "My Profile", "My Password"),
    *("DAGs", "DAG Dependencies", "DAG Runs", "DAG Versions", "DAG Warnings", "Task Instances"),
)
# Not seen, although Viewer sees it: task logs, XComs, code, import errors, jobs, pools, assets, the cluster's activity.
RATER: dict[str, tuple[str, ...]] = {
    **{resource: ("can_read",) for resource in _SEEN},
    "My Password": ("can_read", "can_edit"),
    QUESTIONS: ("can_read", "can_edit", "menu_access"),
    "Browse": ("menu_access",),
}
"""Resource -> actions."""


def for_import() -> list[dict[str, str]]:
    """The role as `airflow roles import` reads it. A role that exists stays as administrators have changed it."""
    return [{"name": "Rater", "resource": resource, "action": ",".join(actions)} for resource, actions in RATER.items()]
