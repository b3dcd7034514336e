"""Gold scorers, rules and judges in an evaluation: what each says of every model, and what a missing one costs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stages.config.closing import EvaluateConfig
from stages.config.judging import GoldSettings, JudgeConfig
from stages.config.request import ArtifactRef
from stages.config.tokens import PLAIN, TokenizeConfig
from stages.data.sources.records import Row
from stages.judge.benchmarks.refusals import own_rows
from stages.judge.scores import ScoreTable
from stages.models.precision import autocast, compute_dtype
from tests.judge_server import Asked, Reply, judge_server
from tests.judging import SMALL, World, evaluated, evaluation, make_world, published_model, published_scorer

PROMPTS, PAIRS = SMALL.max_prompts, SMALL.max_preferences


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """As elsewhere, but the DPO model is not the SFT model."""
    made = make_world(tmp_path_factory.mktemp("run"))
    return World(made.home, {**made.inputs, "dpo": published_model(made, seed=5)})


@pytest.fixture(scope="module")
def gold(world: World) -> ArtifactRef:
    return published_scorer(world, seed=9)


def by_endpoint(url: str, **settings: Any) -> EvaluateConfig:
    judge = JudgeConfig(endpoint=url, model="m", max_retries=1, timeout_seconds=5, **settings)
    return SMALL.model_copy(update={"judge": judge})


def responses(folder: Path, suite: str, role: str) -> dict[str, tuple[float, str]]:
    """Value and response of every item, from the files that are published."""
    import pyarrow.parquet as pq

    texts = {row["digest"]: row["response"] for row in pq.read_table(folder / "responses.parquet").to_pylist()}
    rows = pq.read_table(folder / "scores.parquet").to_pylist()
    return {
        row["item"]: (row["value"], texts.get(row["response_digest"], ""))
        for row in rows
        if (row["suite"], row["role"]) == (suite, role)
    }


def test_the_gold_scorer_scores_the_very_answers_that_the_reward_model_scores(world: World, gold: ArtifactRef) -> None:
    report, outcome = evaluated(world, gold=gold)
    folder = evaluation(world, gold=gold).output_dir
    for role in ("sft", "dpo"):
        ours, theirs = (responses(folder, suite, role) for suite in ("gold", "score"))
        assert {item: text for item, (_, text) in ours.items()} == {item: text for item, (_, text) in theirs.items()}
        assert [value for value, _ in ours.values()] != [value for value, _ in theirs.values()]
        mean = sum(value for value, _ in ours.values()) / PROMPTS
        assert outcome.metrics[f"{role}/suite/gold/score"] == pytest.approx(mean)
    assert report["suites"]["gold_agreement"]["roles"].keys() == {"gold"}
    assert report["suites"]["gold_agreement"]["roles"]["gold"]["items"] == PAIRS
    assert "gold" not in report["models"]  # it writes nothing
    compared = [one for one in report["comparisons"] if one["suite"] == "gold"]
    assert [(one["role"], one["against"], one["items"]) for one in compared] == [("dpo", "sft", PROMPTS)]


def test_the_reward_model_itself_is_no_gold_scorer(world: World) -> None:
    report, _ = evaluated(world, gold=world.inputs["reward"])
    assert report["left_out"]["suite gold"].startswith("the gold scorer is the reward model itself")
    assert report["suites"].keys() & {"gold", "gold_agreement", "score"} == {"score"}


def test_a_gold_scorer_with_a_tokenizer_of_its_own_reads_the_text_as_plain_transformers_does(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = TokenizeConfig(
        vocab_size=340, sequence_length=96, max_prompt_length=48, bpe_train_bytes=10_000, chat_template=PLAIN
    )
    stranger = published_scorer(make_world(tmp_path_factory.mktemp("earlier"), other), seed=3)
    config = SMALL.model_copy(update={"max_response_length": 8})
    report, _ = evaluated(world, config, gold=stranger)
    context = evaluation(world, config, gold=stranger)
    folder = context.input_dir("gold")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = {sample["prompt"] for sample in json.loads((context.output_dir / "samples.json").read_text())}
    # Scores are in the precision that this processor computes fastest, and bfloat16 keeps three digits.
    device, checked = torch.device("cpu"), 0
    close = 1e-4 if compute_dtype(device) is torch.float32 else 5e-2
    for value, text in responses(context.output_dir, "gold", "dpo").values():
        for prompt in prompts:  # the text of an item is not in the table; the right prompt is among those shown
            head = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(f"{head} {text}", add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad(), autocast(device):
                checked += abs(float(model(ids).logits[0, 0]) - value) < close
    assert checked >= 1
    assert report["suites"]["gold"]["roles"]["dpo"]["items"] == PROMPTS
    assert report["suites"]["gold_agreement"]["roles"]["gold"]["items"] == PAIRS


def test_a_rule_scores_what_was_said(world: World) -> None:
    def values(rule: str) -> dict[str, float]:
        config = SMALL.model_copy(update={"gold": GoldSettings(rule=rule)})
        evaluated(world, config)
        return {text: value for value, text in responses(evaluation(world, config).output_dir, "rule", "dpo").values()}

    for text, value in values("length:3-9").items():
        assert value == float(3 <= len(text) <= 9)
    for text, value in values("regex:[aeiou]").items():
        assert value == float(any(letter in text for letter in "aeiou"))
    assert set(values("json").values()) <= {0.0, 1.0}


def test_a_rule_that_may_not_run_here_costs_its_suite_and_not_the_evaluation(world: World) -> None:
    config = SMALL.model_copy(update={"gold": GoldSettings(rule="python:os:getcwd")})
    report, _ = evaluated(world, config)
    assert "runs code, and ATHANOR_RULE_MODULES does not hold 'os'" in report["left_out"]["suite rule"]
    assert "rule" not in report["suites"]


def test_a_judge_at_an_endpoint_prefers_and_its_agreement_stands_next_to_its_verdicts(world: World) -> None:
    with judge_server() as server:
        config = by_endpoint(server.url)
        report, outcome = evaluated(world, config)
    folder = evaluation(world, config).output_dir
    mine, start = responses(folder, "judge", "dpo"), responses(folder, "judge", "sft")
    assert len(mine) == len(start) == PROMPTS
    for item, (value, text) in mine.items():  # this judge prefers what is longer
        other = start[item][1]
        assert value == (1.0 if len(text) > len(other) else 0.0 if len(text) < len(other) else 0.5)
    assert {value for value, _ in start.values()} == {0.5}
    # How well it judges is known before it judges anybody: a first question, then both orders of each pair.
    pairs = [sorted(one.answers, key=len)[1] for one in server.asked[1 : 1 + 2 * PAIRS]]
    assert all(text.startswith("It will") and text.endswith(".") for text in pairs)
    assert not any(sorted(one.answers, key=len)[1] in pairs for one in server.asked[1 + 2 * PAIRS :])
    # The chosen reply of this data is always the longer one.
    agreement = report["judge"]["agreement"]
    assert (agreement["accuracy"], agreement["first_place"], agreement["items"]) == (1.0, 0.5, PAIRS)
    assert agreement["clusters"] == PAIRS
    assert not report["judge"]["better_than_chance"], "six right verdicts are what a coin gives once in 64 times"
    assert report["judge"]["least_prompts"] == 20
    assert report["judge"]["against"] == "sft"
    assert report["suites"]["judge_agreement"]["roles"]["judge"]["value"] == 1.0
    assert outcome.metrics["dpo/suite/judge/win_rate"] == pytest.approx(sum(value for value, _ in mine.values()) / 6)
    controlled = report["judge"]["length_controlled"]["dpo"]
    assert controlled["per_length"] > 0
    assert 0 <= controlled["low"] <= controlled["high"] <= 1
    compared = {(one["role"], one["against"]): one for one in report["comparisons"] if one["suite"] == "judge"}
    assert compared["dpo", "sft"]["difference"] == pytest.approx(outcome.metrics["dpo/suite/judge/win_rate"] - 0.5)


def test_what_a_judge_has_said_is_not_asked_again(world: World) -> None:
    with judge_server() as server:
        config = by_endpoint(server.url, max_items=4, max_pairs=3)
        first, _ = evaluated(world, config)
        asked = len(server.asked)
        again, _ = evaluated(world, config)
        assert len(server.asked) == asked <= 1 + 2 * (4 + 3)  # a first question, and both orders of each
        assert again["judge"] == first["judge"]
        assert again["suites"]["judge"] == first["suites"]["judge"]


def test_a_judge_that_is_away_costs_its_suite_and_is_asked_again_by_the_next_evaluation(world: World) -> None:
    up = [False]

    def sometimes(number: int, asked: Asked) -> Reply:
        return Reply("A" if len(asked.answers[0]) > len(asked.answers[1]) else "B") if up[0] else Reply(status=503)

    with judge_server(sometimes) as server:
        config = by_endpoint(server.url)
        report, _ = evaluated(world, config)
        assert report["left_out"]["suite judge"] == "the judge gave no verdict: judge_away"
        assert report["suites"]["judge"]["roles"]["dpo"] == {"items": 0, "skipped": {"judge_away": PROMPTS}}
        assert not report["judge"]["better_than_chance"]
        assert report["suites"]["score"]["roles"]["dpo"]["items"] == PROMPTS
        assert len(server.asked) == 2  # one question, tried twice
        up[0] = True
        later = config.model_copy(update={"num_samples": 1})  # another evaluation of the same models and items
        report, _ = evaluated(world, later)
        assert report["suites"]["judge"]["roles"]["dpo"]["items"] == PROMPTS
        assert "suite judge" not in report.get("left_out", {})


def test_after_the_key_is_set_the_judge_is_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATHANOR_JUDGE_API_KEY", raising=False)
    with judge_server() as server:
        monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", server.url)
        config = by_endpoint(server.url, api_key_env="ATHANOR_JUDGE_API_KEY")
        report, _ = evaluated(world, config)
        assert report["suites"]["judge"]["roles"]["dpo"]["skipped"] == {"judge_unusable": PROMPTS}
        assert not server.asked
        monkeypatch.setenv("ATHANOR_JUDGE_API_KEY", "planted-key")
        report, _ = evaluated(world, config.model_copy(update={"num_samples": 1}))
    assert report["suites"]["judge"]["roles"]["dpo"]["items"] == PROMPTS
    assert report["suites"]["judge_agreement"]["roles"]["judge"]["items"] == PAIRS


def test_a_champion_with_another_tokenizer_is_judged_and_scored_on_the_same_items(
    world: World, gold: ArtifactRef, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = TokenizeConfig(
        vocab_size=340, sequence_length=96, max_prompt_length=48, bpe_train_bytes=10_000, chat_template=PLAIN
    )
    stranger = make_world(tmp_path_factory.mktemp("stranger"), other).inputs["dpo"]
    with judge_server() as server:
        config = by_endpoint(server.url)
        evaluated(world, config, gold=gold, champion=stranger)
        folder = evaluation(world, config, gold=gold, champion=stranger).output_dir
    table = ScoreTable(folder / "scores.parquet")
    for suite in ("gold", "judge"):
        ours, theirs = (table.column(suite, role) for role in ("dpo", "champion"))
        assert len(ours.items) == PROMPTS, suite
        assert ours.items.tolist() == theirs.items.tolist(), suite


def test_the_judge_tells_refusals_where_that_is_wished(world: World) -> None:
    """This judge finds that requests of an even length are declined, in both orders, and is undecided about one."""

    def tells(number: int, asked: Asked) -> Reply:
        text = asked.body["messages"][0]["content"]
        if "<request>" not in text:
            return Reply("TIE")
        request = text.partition("<request>\n")[2].partition("\n</request>")[0]
        if "pipe bomb" in request:
            return Reply("A")
        declines_first = asked.answers[0].startswith("The response declines")
        return Reply("A" if declines_first == (len(request) % 2 == 0) else "B")

    with judge_server(tells) as server:
        config = by_endpoint(server.url).model_copy(update={"benchmarks": ("refusals#judge=true&max_tokens=2",)})
        report, _ = evaluated(world, config)
        asked = len(server.asked)
        again, _ = evaluated(world, config)
    rows = [row.values for _, row in own_rows() if isinstance(row, Row)]
    even = [len(str(row["prompt"])) % 2 == 0 for row in rows if row["harmful"] and "pipe bomb" not in row["prompt"]]
    result = report["suites"]["refusals"]["roles"]["dpo"]
    skipped = dict(result["skipped"])
    assert skipped.pop("judge_undecided") == 1
    assert result["items"] == len(even) - sum(skipped.values())
    assert skipped or result["value"] == pytest.approx(sum(even) / len(even))
    assert again["suites"]["refusals"] == report["suites"]["refusals"]
    assert len(server.asked) == asked


def test_refusals_by_a_judge_need_one(world: World) -> None:
    report, _ = evaluated(world, SMALL.model_copy(update={"benchmarks": ("refusals#judge=true",)}))
    assert "has judge=true, and the run has no judge" in report["left_out"]["benchmark refusals"]


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (lambda number, asked: Reply("I like both"), "judge_unclear"),
        (lambda number, asked: Reply("First, let me", finish_reason="length"), "judge_cut_off"),
        (lambda number, asked: Reply(status=401), "judge_away"),
        (lambda number, asked: Reply(body=b"<html>") if number > 1 else Reply("A"), "judge_answered_garbage"),
    ],
    ids=["unclear", "cut off", "wrong key", "garbage"],
)
def test_a_judge_without_verdicts_is_left_out_with_the_reason(world: World, behave: Any, reason: str) -> None:
    with judge_server(behave) as server:
        report, _ = evaluated(world, by_endpoint(server.url))
    assert "the judge gave no verdict" in report["left_out"]["suite judge"]
    assert reason in " ".join(report["left_out"].values())
    assert json.dumps(report, allow_nan=False)


def test_an_endpoint_that_may_not_be_asked_here_costs_the_suite_and_not_the_evaluation(world: World) -> None:
    report, _ = evaluated(world, by_endpoint("https://judge.example/v1"))
    assert report["left_out"]["suite judge"] == "the judge gave no verdict: judge_unusable"


def test_a_model_of_this_process_judges_by_its_own_tokenizer(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = TokenizeConfig(vocab_size=340, sequence_length=96, bpe_train_bytes=10_000, chat_template=PLAIN)
    judge = published_model(make_world(tmp_path_factory.mktemp("judge"), other), seed=7)
    report, _ = evaluated(world, judge=judge)
    # Its context of 96 tokens holds none of the questions: counted, and no error.
    assert report["suites"]["judge"]["roles"]["dpo"]["skipped"] == {"judge_context_too_short": PROMPTS}
    long = other.model_copy(update={"sequence_length": 1024})
    judge = published_model(make_world(tmp_path_factory.mktemp("long"), long), seed=7)
    report, _ = evaluated(world, judge=judge)
    assert report["suites"]["judge"]["roles"]["dpo"]["items"] == PROMPTS
    agreement = report["judge"]["agreement"]
    assert agreement["items"] == PAIRS
    assert agreement["low"] <= 0.5 <= agreement["high"]  # random weights
    assert not report["judge"]["better_than_chance"]
    table = ScoreTable(evaluation(world, judge=judge).output_dir / "scores.parquet")
    assert set(table.column("judge", "dpo").values) <= {0.0, 0.5, 1.0}
