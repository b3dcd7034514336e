"""The stage as its job runs it: with a model of the process, with an endpoint, killed in the middle, and what curation
and the gate make of it."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from stages import curate
from stages.artifacts.manifests import read_manifest
from stages.config.constitution import ConstitutionConfig
from stages.config.curate import CurateConfig
from stages.config.errors import DataError, StageError
from stages.config.gate_evidence import Evidence
from stages.config.gate_ledgers import by_constitution, read_from_stages
from stages.config.gate_records import Outcome
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, Manifest
from stages.constitution import DISAGREEMENT, apply_constitution
from stages.data.sources.records import stable_hash
from stages.job.context import StageContext, StageOutcome
from tests.curating import digests, write_jsonl
from tests.judge_server import Asked, Reply, judge_server
from tests.making import kill_after, random_model, rows_of
from tests.small_world import make_context, published

QUESTIONS = [f"What does a {thing} do at night?" for thing in ("fox", "lamp", "river", "baker", "train", "harbour")]
_TWO = re.compile(r"Answer A:\n(.*?)\n\nAnswer B:\n(.*?)\n\n", re.DOTALL)


def talk(number: int, asked: Asked) -> Reply:
    """A model that says something else about everything, and prefers the response with the higher number."""
    mark = stable_hash(asked.text, asked.body.get("seed", 0)) % 10**6
    if found := _TWO.search(asked.text):
        first, second = (int(re.findall(r"\d+", text)[0]) for text in found.groups())
        return Reply("A" if first > second else "B")
    if "Critique request:" in asked.text:
        return Reply(f"It names no reason for {mark}, and so nobody learns why.")
    if "Revision request:" in asked.text:
        return Reply(f"With reason {mark}: because it is dark then, and for a fox the mice come out.")
    return Reply(f"Statement {mark} is all that this response has to say about the question.")


def config_of(home: Path, url: str = "", **settings: Any) -> ConstitutionConfig:
    prompts = write_jsonl(home / "prompts.jsonl", [{"prompt": text} for text in QUESTIONS])
    critic = {"endpoint": url, "model": "m", "concurrency": 1, "max_retries": 0} if url else {}
    return ConstitutionConfig.model_validate(
        {"makes": "both", "prompts": [prompts], "critic": critic, "max_response_length": 24, **settings}
    )


def run(
    home: Path, config: ConstitutionConfig, inputs: dict[str, ArtifactRef] | None = None
) -> tuple[StageOutcome, StageContext]:
    context = make_context(home, Stage.CONSTITUTION, config, inputs)
    return apply_constitution(context), context


def recorded(context: StageContext, outcome: StageOutcome) -> Manifest:
    return read_manifest(published(context)).model_copy(update={"ledger": outcome.ledger})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageOutcome, StageContext]:
    home = tmp_path_factory.mktemp("made")
    with judge_server(talk) as server:
        return run(home, config_of(home, server.url))


def test_an_endpoint_responds_criticises_revises_and_compares(made: tuple[StageOutcome, StageContext]) -> None:
    outcome, context = made
    ledger = outcome.ledger
    assert ledger["prompts"] == {"in": 6, "kept": 6, "dropped": {}}
    assert ledger["responses"]["kept"] == ledger["rounds"]["kept"] == ledger["comparisons"]["kept"] == 6
    assert ledger["published"] == {"instructions": 6, "preferences": 12, "revision": 6, "labelled": 6}
    assert outcome.metrics["constitution/accepted_share"] == 1.0
    labelled = [row for row in rows_of(context, "preferences") if row["made"] == "labelled"]
    numbers = [[int(re.findall(r"\d+", row[side])[0]) for side in ("chosen", "rejected")] for row in labelled]
    assert all(chosen > rejected for chosen, rejected in numbers)
    assert all(row["messages"][-1]["content"].startswith("With reason") for row in rows_of(context, "instructions"))
    assert ledger["models"]["critic"] == ledger["models"]["responder"]


def test_curation_reads_it_and_keeps_area_and_principle_as_the_reason(
    made: tuple[StageOutcome, StageContext], tmp_path: Path
) -> None:
    outcome, context = made
    config = CurateConfig(
        documents=(), instructions=("constitution",), preferences=("constitution",), planted=0, toxicity="none"
    )
    curating = make_context(tmp_path, Stage.CURATE, config, {"constitution": published(context)})
    curated = curate.run(curating)
    read = curated.ledger["preferences"]["sources"]["constitution"]
    assert (read["in"], read["kept"], read["formats"]) == (12, 12, {"pair": 12})
    with gzip.open(curating.output_dir / "preferences" / "train.jsonl.gz", "rt") as file:
        pairs = [json.loads(line) for line in file]
    area, principle = pairs[0]["reason"].split(", ")
    assert area in ("helpful", "honest", "harmless")
    assert principle in outcome.ledger["principles"]["rounds"] | outcome.ledger["principles"]["comparisons"]
    assert {pair["group"] for pair in pairs} == {"constitution"}
    evidence = Evidence(recorded(curating, curated), inputs={"constitution": recorded(context, outcome)})
    assert [check.outcome for check in read_from_stages(evidence)] == [Outcome.PASSED, Outcome.PASSED]
    curated.ledger["preferences"]["sources"]["constitution"]["in"] = 11
    assert [check.outcome for check in read_from_stages(evidence)] == [Outcome.PASSED, Outcome.FAILED]


def test_the_gate_counts_again(made: tuple[StageOutcome, StageContext]) -> None:
    outcome, context = made
    manifest = recorded(context, outcome)
    assert {check.outcome for check in by_constitution(manifest)} == {Outcome.PASSED}
    for path, value in {("rounds", "kept"): 5, ("comparisons", "in"): 7, ("published", "instructions"): 5}.items():
        ledger = json.loads(json.dumps(outcome.ledger))
        ledger[path[0]][path[1]] = value
        checks = by_constitution(manifest.model_copy(update={"ledger": ledger}))
        assert Outcome.FAILED in {check.outcome for check in checks}, path


def test_the_page_shows_all_texts_and_no_markup_of_theirs(tmp_path: Path) -> None:
    def shout(number: int, asked: Asked) -> Reply:
        reply = talk(number, asked)
        return reply if _TWO.search(asked.text) else Reply(f"{reply.content} <script>alert(1)</script>")

    with judge_server(shout) as server:
        _, context = run(tmp_path, config_of(tmp_path, server.url))
    page = (context.output_dir / "constitution.html").read_text()
    assert "<script" not in page
    assert page.count("<article>") == len(QUESTIONS)
    assert "With reason" in page
    assert all(question.replace("'", "&#39;") in page for question in QUESTIONS)


def test_a_critic_that_prefers_a_place_labels_nothing(tmp_path: Path) -> None:
    def first(number: int, asked: Asked) -> Reply:
        return Reply("A") if _TWO.search(asked.text) else talk(number, asked)

    with judge_server(first) as server:
        outcome, context = run(tmp_path, config_of(tmp_path, server.url))
    assert outcome.ledger["comparisons"] == {"in": 6, "kept": 0, "dropped": {DISAGREEMENT: 6}}
    assert outcome.metrics["constitution/first_place_share"] == 1.0
    assert {row["made"] for row in rows_of(context, "preferences")} == {"revision"}


def test_every_step_of_the_work_on_a_prompt_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    """Critique and revision are asked with different messages, which no test of the work alone would miss."""
    with judge_server(talk) as server:
        run(tmp_path, config_of(tmp_path, server.url, rounds=2, critic_temperature=1.0))
        kinds = {"Revision request:": "revision", "Critique request:": "critique", "Answer A:": "comparison"}
        seeds: dict[str, set[int]] = {}
        for one in server.asked:
            kind = next((kind for words, kind in kinds.items() if words in one.text), "response")
            seeds.setdefault(kind, set()).add(one.body["seed"])
    assert {kind: len(found) for kind, found in seeds.items()} == {
        "response": 2, "critique": 2, "revision": 2, "comparison": 1,
    }  # fmt: skip
    assert len(set().union(*seeds.values())) == 7


def test_an_endpoint_that_goes_away_ends_the_attempt_and_the_next_one_asks_only_what_is_missing(tmp_path: Path) -> None:
    def breaking(number: int, asked: Asked) -> Reply:
        return talk(number, asked) if number <= 15 else Reply(status=503, body=b"")

    with judge_server(breaking) as server:
        port, config = int(server.url.rsplit(":", 1)[1].split("/")[0]), config_of(tmp_path, server.url)
        with pytest.raises(StageError, match="is away: HTTP 503"):
            run(tmp_path, config)
    with judge_server(talk, port=port) as server:
        outcome, _ = run(tmp_path, config)
        assert len(server.asked) == 6 * 6 - 15  # two responses, critique, revision and two orders for each prompt
    assert outcome.ledger["responses"]["kept"] == 6


def test_without_anything_accepted_the_stage_says_what_was_dropped(tmp_path: Path) -> None:
    with judge_server(lambda number, asked: Reply("No.")) as server:
        with pytest.raises(DataError, match=r"made no instructions of 6 prompts; responses: \{'too_short': 6\}"):
            run(tmp_path, config_of(tmp_path, server.url))


def test_prompts_of_an_area_without_principles_are_refused_before_a_model_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text(
        "name: Ours\nversion: 1\nprinciples:\n"
        "- {id: a, area: helpful, critique: Is it so, revision: Do it, comparison: Which one}\n"
    )
    with judge_server(talk) as server:
        config = config_of(tmp_path, server.url, principles=str(path))
        config = config.model_copy(update={"prompts": (f"{config.prompts[0]}#area=honest",)})
        with pytest.raises(DataError, match="'Ours' has no principle of the area honest"):
            run(tmp_path, config)
        assert server.asked == []


def test_a_kill_in_the_middle_changes_nothing_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    with judge_server(talk) as server:
        config = config_of(tmp_path, server.url)
        _, undisturbed = run(tmp_path / "whole", config)
        before, home = len(server.asked), tmp_path / "killed"
        asked = kill_after(14, server, apply_constitution, stage=Stage.CONSTITUTION, config=config, home=home)
        assert 14 <= asked < 36
        _, resumed = run(home, config)
        # What was under way when the process died may be asked again: one request, with concurrency=1.
        assert 36 <= len(server.asked) - before <= 37
    assert digests(resumed.output_dir) == digests(undisturbed.output_dir)


def test_a_model_of_the_process_is_its_own_critic_and_a_second_attempt_generates_nothing(
    tmp_path: Path,
) -> None:
    model = random_model(tmp_path / "model", sequence_length=3000, ending=8)
    asked = [{"prompt": f"What is {number}?"} for number in range(48)]
    prompts = write_jsonl(tmp_path / "asked.jsonl", asked)
    config = config_of(
        tmp_path,
        makes="pairs",
        prompts=[prompts],
        min_words=1,
        critic_temperature=1.0,
        max_copied=1.0,
        max_similarity=1.0,
    )
    outcome, context = run(tmp_path, config, {"base_model": model})
    account = outcome.ledger["asked"]["critic"]
    assert account["found_in_store"] == 0
    assert list(outcome.ledger["asked"]) == ["critic"]  # one model in memory
    assert outcome.ledger["published"]["preferences"] == len(rows_of(context, "preferences")) > 0
    before = digests(context.output_dir)
    again, second = run(tmp_path, config, {"base_model": model})
    assert again.ledger["asked"]["critic"]["found_in_store"] == account["requests"]
    assert again.metrics == outcome.metrics
    assert digests(second.output_dir) == before
    assert not (second.output_dir / "instructions.jsonl").exists()
