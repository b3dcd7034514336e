"""The stage as its job runs it: with an endpoint, with a model of the process, killed in the middle, and read by
curation."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from stages import curate
from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError, DataError, StageError
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.synthesis import SynthesizeConfig
from stages.config.tokens import PLAIN, TokenizeConfig
from stages.data.sources.records import stable_hash
from stages.job.context import StageContext, StageOutcome
from stages.synthesize import synthesize
from tests.curating import write_jsonl
from tests.judge_server import Asked, Reply, judge_server
from tests.judging import make_world
from tests.making import kill_after, random_model, rows_of
from tests.small_world import make_context, published

SEEDS = [
    {"instruction": "Sum up the text.", "input": "A long text about ships.", "output": "Ships."},
    {"instruction": "Tell me a joke about cats.", "output": "No."},
    {"instruction": "Name five rivers of Africa.", "output": "The Nile and four more."},
]
SUBJECTS = ("bridge", "volcano", "tailor", "harbour", "comet", "orchard", "lantern", "glacier")
VERBS = ("Describe", "Compare", "Explain", "Imagine", "Defend", "Rhyme", "Translate", "Question")


def talk(number: int, asked: Asked) -> Reply:
    """A model that proposes, by the seed of the request, two tasks of which one has an input, and answers each."""
    seed = int(asked.body["seed"])
    if asked.text.startswith("Here is a list"):
        place = seed % len(SUBJECTS)
        one, other, third = (SUBJECTS[(place + step) % len(SUBJECTS)] for step in (0, 3, 5))
        tasks = (
            f"4. {VERBS[place]} {one} {other} made of {third}.\n5. {VERBS[-place]} {third} before {one} sees {other}."
        )
        return Reply(tasks, usage=(100, 20))
    if asked.text.startswith("Task: "):
        return Reply("none" if "made of" in asked.text else "dark, quiet", usage=(50, 2))
    mark = stable_hash(asked.text, seed) % 10**6
    return Reply(f"Nobody has said it before me, and the number is {mark}.", usage=(10, 8))


def config_of(home: Path, url: str = "", **settings: Any) -> SynthesizeConfig:
    seeds = write_jsonl(home / "seeds.jsonl", SEEDS)
    generator = {"endpoint": url, "model": "m", "concurrency": 1, "max_retries": 0} if url else {}
    given = {"method": "self_instruct", "sources": [seeds], "num_rows": 6, "prompts_per_round": 2, "max_rounds": 9}
    return SynthesizeConfig.model_validate({**given, "generator": generator, **settings})


def run(
    home: Path, config: SynthesizeConfig, inputs: dict[str, ArtifactRef] | None = None
) -> tuple[StageOutcome, StageContext]:
    context = make_context(home, Stage.SYNTHESIZE, config, inputs)
    return synthesize(context), context


def digests(folder: Path, name: str) -> str:
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def rows(context: StageContext, name: str = "instructions") -> list[dict[str, Any]]:
    return rows_of(context, name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageOutcome, StageContext]:
    home = tmp_path_factory.mktemp("made")
    with judge_server(talk) as server:
        return run(home, config_of(home, server.url))


def test_an_endpoint_writes_tasks_inputs_and_responses(made: tuple[StageOutcome, StageContext]) -> None:
    outcome, context = made
    ledger = outcome.ledger
    assert ledger["sources"] == {"in": 3, "kept": 3, "dropped": {}}
    assert [ledger[step]["kept"] for step in ("instructions", "inputs", "responses", "rows")] == [6] * 4
    assert ledger["published"] == {"instructions": 6}
    found = rows(context)
    assert [turn["role"] for turn in found[0]["messages"]] == ["user", "assistant"]
    assert sum(row["messages"][0]["content"].endswith("\n\ndark, quiet") for row in found) == 3
    assert all(row["messages"][1]["content"].startswith("Nobody has said it") for row in found)
    provenance = found[0]["provenance"]
    assert provenance["generator"].startswith("m at http://127.0.0.1:")
    assert set(provenance["seeds"]) <= {f"seeds.jsonl:{number}" for number in (1, 2, 3)} | {"made-0", "made-1"}
    assert len({row["provenance"]["prompt"] for row in found}) == 6


def test_tokens_and_cost_are_in_metrics_and_ledger(tmp_path: Path) -> None:
    prices = {"price_prompt": 1000.0, "price_answer": 2000.0}
    with judge_server(talk) as server:
        config = config_of(tmp_path, server.url)
        config = config.model_copy(update={"generator": config.generator.model_copy(update=prices)})
        outcome, _ = run(tmp_path, config)
        asked = len(server.asked)
    proposals = asked - 12
    prompt, answer = 100 * proposals + 6 * 50 + 6 * 10, 20 * proposals + 6 * 2 + 6 * 8
    assert outcome.metrics["synthesize/requests"] == asked
    assert outcome.metrics["synthesize/prompt_tokens"] == prompt
    assert outcome.metrics["synthesize/answer_tokens"] == answer
    assert outcome.metrics["synthesize/cost"] == pytest.approx(prompt / 1000 + 2 * answer / 1000)
    assert outcome.ledger["asked"]["found_in_store"] == 0


def test_curation_reads_it_as_a_source_of_instructions(made: tuple[StageOutcome, StageContext], tmp_path: Path) -> None:
    _, context = made
    config = CurateConfig(documents=(), instructions=("synthesize",), preferences=(), planted=0, toxicity="none")
    curating = make_context(tmp_path, Stage.CURATE, config, {"synthesize": published(context)})
    curated = curate.run(curating)
    read = curated.ledger["instructions"]["sources"]["synthesize"]
    assert (read["in"], read["kept"], read["formats"]) == (6, 6, {"messages": 6})
    with gzip.open(curating.output_dir / "instructions" / "train.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    assert {line["group"] for line in lines} == {"synthesize"}


def test_the_page_shows_what_was_kept_and_dropped_and_no_markup_of_theirs(tmp_path: Path) -> None:
    def shout(number: int, asked: Asked) -> Reply:
        reply = talk(number, asked)
        if asked.text.startswith(("Here", "Task")):
            return reply
        refuses = "made of" in asked.text
        return Reply("I cannot help with that." if refuses else f"{reply.content} <script>alert(1)</script>")

    with judge_server(shout) as server:
        outcome, context = run(tmp_path, config_of(tmp_path, server.url))
    page = (context.output_dir / "synthesis.html").read_text()
    assert outcome.ledger["rows"]["dropped"] == {"refusal": 3}
    assert "3 of 3 accepted rows" in page
    assert "3 of 3 dropped rows" in page
    assert "I cannot help with that." in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert [row["outcome"] for row in rows(context, "transcript")].count("refusal") == 3


def test_a_spent_budget_keeps_what_is_done_and_a_larger_one_continues(tmp_path: Path) -> None:
    with judge_server(talk) as server:
        config = config_of(tmp_path, server.url, ask_for_inputs=False, prompts_per_round=3)

        def limited(requests: int) -> SynthesizeConfig:
            generator = config.generator.model_copy(update={"budget_requests": requests})
            return config.model_copy(update={"generator": generator})

        outcome, context = run(tmp_path, limited(5))
        assert len(server.asked) == 5
        assert outcome.ledger["rows"] == {"in": 6, "kept": 2, "dropped": {"budget_spent": 4}}
        first = rows(context)
        outcome, context = run(tmp_path, limited(9))
        assert len(server.asked) == 9
        assert outcome.ledger["rows"]["kept"] == 6
        assert rows(context)[:2] == first


def test_an_endpoint_that_is_away_fails_the_attempt_and_no_row_counts_as_dropped(tmp_path: Path) -> None:
    broken = [True]

    def dies(number: int, asked: Asked) -> Reply:
        return Reply(status=503, body=b"down") if number > 8 and broken[0] else talk(number, asked)

    with judge_server(dies) as server:
        config = config_of(tmp_path, server.url)
        with pytest.raises(StageError, match="is away: HTTP 503 'down'"):
            run(tmp_path, config)
        broken[0] = False
        outcome, _ = run(tmp_path, config)
        asked = [(one.text, one.body["seed"]) for one in server.asked]
    assert outcome.ledger["rows"] == {"in": 6, "kept": 6, "dropped": {}}
    answered = asked[:8] + asked[11:]
    assert len(set(answered)) == len(answered)  # nothing that was answered was asked again


def test_nothing_accepted_is_an_error_that_says_why(tmp_path: Path) -> None:
    with judge_server(lambda number, asked: Reply("I would rather not.")) as server:
        with pytest.raises(DataError, match=r"made no row; dropped: \{'instructions': \{'no_list': 18\}\}"):
            run(tmp_path, config_of(tmp_path, server.url))
    with pytest.raises(ConfigError, match="the stage reads no model as generator or base_model"):
        run(tmp_path, config_of(tmp_path))


def test_distillation_keeps_the_best_by_a_rule(tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What is {number}?"} for number in range(4)])

    def longer(number: int, asked: Asked) -> Reply:
        return Reply("It is said to be much." if asked.body["seed"] == 2 else "It is " + "very " * 2 + "much, really.")

    settings = {"num_responses": 3, "scorer": {"kind": "length", "most": 22, "margin": 20}, "min_score": 0.9}
    config = SynthesizeConfig.model_validate({"method": "distillation", "sources": [prompts], **settings})
    with judge_server(longer) as server:
        generator = {"endpoint": server.url, "model": "m"}
        config = SynthesizeConfig.model_validate({**config.model_dump(mode="json"), "generator": generator})
        outcome, context = run(tmp_path, config)
        assert len(server.asked) == 12
    assert {row["messages"][1]["content"] for row in rows(context)} == {"It is said to be much."}
    assert {row["provenance"]["score"] for row in rows(context)} == {1.0}
    assert outcome.ledger["responses"] == {"in": 12, "kept": 12, "dropped": {}}


def test_a_kill_in_the_middle_changes_no_row_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    with judge_server(talk) as server:
        config = config_of(tmp_path, server.url)
        _, undisturbed = run(tmp_path / "whole", config)
        whole, home = len(server.asked), tmp_path / "killed"
        asked = kill_after(9, server, synthesize, stage=Stage.SYNTHESIZE, config=config, home=home)
        assert 9 <= asked < whole
        outcome, resumed = run(home, config)
        # What was under way when the process died may be asked again: one request, with concurrency=1.
        assert 2 * whole <= len(server.asked) <= 2 * whole + 1
    assert outcome.ledger["asked"]["found_in_store"] >= 8
    assert digests(resumed.output_dir, "instructions.jsonl") == digests(undisturbed.output_dir, "instructions.jsonl")
    assert rows(resumed, "transcript") == rows(undisturbed, "transcript")


def test_a_model_of_the_process_writes_and_a_second_attempt_generates_nothing(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", sequence_length=1024, ending=12)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What is {number}?"} for number in range(20)])
    loose = {"max_copied": 1.0, "max_repetition": 1.0, "min_language_score": 0.0, "num_responses": 2}
    config = SynthesizeConfig.model_validate(
        {
            "method": "distillation",
            "sources": [prompts],
            "max_response_length": 24,
            "response_temperature": 1.0,
            **loose,
        }
    )
    outcome, context = run(tmp_path, config, {"base_model": model})
    assert outcome.ledger["sources"]["kept"] == 20
    assert outcome.ledger["responses"]["in"] == 40
    assert 0 < outcome.ledger["rows"]["kept"] == len(rows(context))
    assert outcome.ledger["generator"].startswith("dpo-model ")
    assert outcome.ledger["asked"]["requests"] == 40
    before = digests(context.output_dir, "instructions.jsonl")
    again, second = run(tmp_path, config, {"base_model": model})
    assert again.ledger["asked"]["found_in_store"] == 40
    assert digests(second.output_dir, "instructions.jsonl") == before
    assert again.metrics == outcome.metrics


def test_the_best_response_is_the_one_that_the_reward_model_scores_highest(tmp_path: Path) -> None:
    home = tmp_path / "world"
    settings = TokenizeConfig(vocab_size=340, sequence_length=1024, bpe_train_bytes=10_000, chat_template=PLAIN)
    world = make_world(home, settings)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "What is the sea?"}, {"prompt": "Who swims?"}])
    with judge_server(lambda number, asked: Reply(f"It is the number {number} of all.")) as server:
        config = SynthesizeConfig.model_validate(
            {
                "method": "distillation",
                "sources": [prompts],
                "num_responses": 4,
                "scorer": {"kind": "reward_model"},
                "generator": {"endpoint": server.url, "model": "m"},
            }
        )
        outcome, context = run(tmp_path, config, {"reward_model": world.inputs["reward"]})
    assert outcome.ledger["rows"]["kept"] == 2
    for told in rows(context, "transcript"):
        scores = [response["score"] for response in told["responses"]]
        assert told["provenance"]["score"] == max(scores)
        kept = next(row for row in rows(context) if row["provenance"]["prompt"] == told["provenance"]["prompt"])
        assert kept["messages"][1]["content"] == told["responses"][scores.index(max(scores))]["text"]
