"""What `verify` found, for people and for programs."""

import json
from dataclasses import asdict

from stages.config.markdown import code, plain, table
from stages.config.text import byte_size, printable
from stages.lineage.signatures import Signed
from stages.lineage.verification import Checked, Report

_SHORT = 12


def verify_json(report: Report) -> str:
    found = {"intact": report.is_intact, "summary": summary(report), **asdict(report)}
    return printable(json.dumps(found, indent=1, ensure_ascii=False)) + "\n"


def verify_markdown(report: Report) -> str:
    """A table of artifacts, one of what came from outside, then what is wrong, with the way out, and the verdict."""
    rows = [
        (
            code(f"{one.kind}/{one.fingerprint[:_SHORT]}"),
            str(one.num_files),
            byte_size(one.num_bytes),
            code(one.digest[:_SHORT]) if one.digest else "unknown",
            _signature(one),
            "**wrong**" if one.problems else "intact",
        )
        for one in report.checked
    ]
    parts = [table(("artifact", "files", "size", "content", "signature", "result"), rows)]
    if report.outside:
        outside = [
            (plain(one.role), code(one.uri), code(one.digest[:_SHORT]), plain(one.found, at_most=200))
            for one in report.outside
        ]
        parts.append(table(("from outside", "what", "digest", "today"), outside))
    if report.problems:
        parts.append("\n".join(f"- {code(uri)}: {plain(problem)}" for uri, problem in report.problems))
        parts.append(
            "Do not use this model. A damaged artifact is built again when the task of its stage is cleared; if nobody "
            "can say how it came about, find out who may write to the store first."
        )
    parts.append(summary(report))
    return "\n\n".join(parts) + "\n"


def _signature(one: Checked) -> str:
    keys = ", ".join(key[:_SHORT] for key in one.signature.keys)
    return f"{one.signature.signed.value} ({keys})" if keys else one.signature.signed.value


def summary(report: Report) -> str:
    """The verdict in one line, with what it does not cover."""
    files, size = sum(one.num_files for one in report.checked), sum(one.num_bytes for one in report.checked)
    read = f"{len(report.checked)} artifacts, {files} files, {byte_size(size)} read"
    if report.problems:
        wrong = sum(bool(one.problems) for one in report.checked)
        return f"{read}: {len(report.problems)} problems in {wrong} of the artifacts."
    notes = []
    if report.keys:
        keys = ", ".join(key[:_SHORT] for key in report.keys)
        notes.append(f"every manifest is signed by {keys}")
    else:
        some = any(one.signature.signed is Signed.UNCHECKED for one in report.checked)
        notes.append(
            "signatures were not checked: give the public key with --key"
            if some
            else "nothing is signed, so a manifest that was forged together with all that names it would not be noticed"
        )
    if report.outside:
        states = [one.found for one in report.outside]
        unchanged, changed = states.count("unchanged"), states.count("changed since")
        rest = len(states) - unchanged - changed
        told = [(unchanged, "unchanged"), (changed, "changed since then"), (rest, "not looked at or not reachable")]
        notes.append("sources from outside: " + ", ".join(f"{number} {what}" for number, what in told if number))
    return f"{read}: all as published; {'; '.join(notes)}."
