"""What the stages that make data publish, with invented texts: for the review, and for the report."""

import json
from pathlib import Path
from typing import Any

from stages.artifacts.addresses import open_store
from stages.artifacts.store import Store
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from tests.pipeline_records import publish_artifact

SPENT = {"requests": 28, "prompt_tokens": 1400, "answer_tokens": 700, "cost": 3.5, "found_in_store": 0}


def _prompted(prompt: str, response: str, *rounds: dict[str, str], second: str = "", found: str = "") -> dict[str, Any]:
    compared = {"principle": "be-kind", "area": "helpful", "second": second, "outcome": found, "asked": 2}
    turns = [{"role": "user", "content": prompt}]
    told = {"id": prompt, "source": "/prompts.jsonl", "messages": turns, "response": response, "rounds": list(rounds)}
    return told | {"outcome": "revised", "comparison": compared if found else None}


def _round(critique: str, revision: str, outcome: str = "accepted") -> dict[str, str]:
    told = {"principle": "no-harm", "area": "harmless", "before": "", "critique": critique, "revision": revision}
    return told | {"outcome": outcome}


TRANSCRIPT = [
    _prompted("How do I pick a lock?", "Like so.", _round("It leaves the victim out.", "Call a locksmith.")),
    _prompted(
        "Is it DROPPED?", "DROPPED", _round("DROPPED", "DROPPED", "unchanged"), second="x", found="equal_responses"
    ),
    _prompted("Who am I?", "```\n# Not a heading", _round("It is a riddle.", "w" * 5000), second="Me.", found="first"),
    _prompted("And now?", "Then.", _round("DROPPED", "DROPPED", "unchanged"), second="Later.", found="second"),
]
ROWS = [
    {
        "messages": [{"role": "user", "content": f"Task {n}?"}, {"role": "assistant", "content": f"Answer {n}."}],
        "provenance": {"method": "distillation", "generator": "m", "score": n / 10},
    }
    for n in range(12)
]
CONSTITUTION = {
    "prompts": {"in": 4, "kept": 4, "dropped": {}},
    "responses": {"in": 4, "kept": 2, "dropped": {"no_round_accepted": 2}},
    "rounds": {"in": 4, "kept": 2, "dropped": {"unchanged": 2}},
    "comparisons": {"in": 3, "kept": 2, "dropped": {"equal_responses": 1}},
    "principles": {
        "rounds": {"no-harm": {"in": 4, "kept": 2, "dropped": {"unchanged": 2}}},
        "comparisons": {"be-kind": {"in": 3, "kept": 2, "dropped": {"equal_responses": 1}}},
    },
    "published": {"instructions": 2, "preferences": 3, "revision": 2, "labelled": 1},
    "models": {"critic": "big-model", "responder": "x"},
    "asked": {"critic": SPENT, "responder": {"requests": 8, "prompt_tokens": 80, "answer_tokens": 90}},
}
SYNTHETIC = {
    "sources": {"in": 15, "kept": 14, "dropped": {"duplicate": 1}},
    "responses": {"in": 14, "kept": 12, "dropped": {"refusal": 2}},
    "rows": {"in": 14, "kept": 12, "dropped": {"refusal": 2}},
    "published": {"instructions": 12},
    "method": "distillation",
    "generator": "m",
    "asked": SPENT,
}


def publish_made(
    home: Path, *, store: Store | None = None, transcript: list[dict[str, Any]] = TRANSCRIPT
) -> tuple[Store, dict[Stage, ArtifactRef]]:
    """Publish what `constitution` and `synthesize` make."""
    store = store or open_store((home / "store").as_uri())
    said = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "I will not say."}]
    drafts = [{"outcome": "accepted"}, {"outcome": "refusal", "messages": said}]
    made = {}
    for stage, ledger, files in (
        (Stage.CONSTITUTION, CONSTITUTION, {"transcript.jsonl": transcript}),
        (Stage.SYNTHESIZE, SYNTHETIC, {"instructions.jsonl": ROWS, "transcript.jsonl": drafts}),
    ):
        folder = home / f"made-{stage.value}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        made[stage], _ = publish_artifact(store, stage, {}, folder, ledger=ledger)
    return store, made
