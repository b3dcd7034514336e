"""The published model as its own critic, on three prompts: it writes critiques and revisions, and all is counted."""

import json
from pathlib import Path

import pytest

from stages.config.constitution import ConstitutionConfig
from stages.config.graph import Stage
from stages.constitution import apply_constitution
from tests.curating import write_jsonl
from tests.real.conftest import Played
from tests.small_world import make_context

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1800)]

ASKED = ("What is the capital of Italy?", "Name three colours of the rainbow.", "Is it safe to drink sea water?")


def test_it_criticises_and_revises_its_own_responses(played: Played, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ASKED])
    config = ConstitutionConfig(
        makes="both",  # pyright: ignore[reportArgumentType]
        prompts=(f"{prompts}#area=helpful+honest",),
        temperature=0.0,
        max_response_length=96,
        max_critique_length=48,
        comparisons=False,
    )
    context = make_context(tmp_path, Stage.CONSTITUTION, config, {"base_model": played.artifacts[Stage.CONVERT]})
    outcome = apply_constitution(context)
    records = [json.loads(line) for line in (context.output_dir / "transcript.jsonl").read_text().splitlines()]
    assert {record["messages"][0]["content"] for record in records} == set(ASKED)
    rounds = [one for record in records for one in record["rounds"]]
    assert all(len(one["critique"].split()) > 3 for one in rounds)
    assert not any("<|im_" in text for one in rounds for text in (one["critique"], one["revision"]))
    for step in ("prompts", "responses", "rounds"):
        counted = outcome.ledger[step]
        assert counted["in"] == counted["kept"] + sum(counted["dropped"].values())
    assert outcome.ledger["published"]["instructions"] == outcome.ledger["responses"]["kept"] > 0
