"""Questions to raters, and how their answers become preference pairs that the pipeline takes as they are."""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from operators.failures import StageDataFailed
from operators.people.answers import complete, pairs_of, publish_preferences
from operators.people.collect import make_questions, request_key
from operators.people.rating import SKIP, TIE, Outcome, body, options, read_answer, read_responses, shown_order
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import read_file, read_manifest
from stages.artifacts.store import Store, write_json
from stages.config.collect import RespondConfig
from stages.config.curate import CurateConfig
from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from tests.pipeline_records import publish_artifact, request_for, run_info

WORDS = ("apple", "river", "lantern", "harbour", "meadow", "copper")


def respond(root: Path, *, prompts: int = 6, responses: int = 2) -> tuple[Store, ArtifactRef, list[dict[str, Any]]]:
    """A `responses` artifact of a model, as the stage publishes it."""
    store = open_store((root / "store").as_uri())
    folder = root / "responses"
    folder.mkdir(parents=True)
    rows = [
        {
            "id": f"prompt-{number}",
            "prompt": f"What is the {WORDS[number]} for?",
            "responses": [f"The {WORDS[number]} serves purpose {letter}." for letter in "abcd"[:responses]],
        }
        for number in range(prompts)
    ]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ArtifactRef(kind="dpo-model", uri="file:///m/artifacts/dpo-model/1", fingerprint="1", digest="2")
    ref, _ = publish_artifact(store, Stage.RESPOND, {"model": model}, folder)
    request = request_for(Stage.RESPOND, store, {"model": model}, RespondConfig(num_responses=responses))
    write_json(store, request_key("manual-1"), request.model_dump(mode="json"))
    return store, ref, rows


def event(option: str, **changed: Any) -> dict[str, Any]:
    return {
        "chosen_options": [option],
        "params_input": {"reasons": ["honest"], "comment": " clear "},
        "responded_at": datetime(2026, 11, 24, 9, 30, tzinfo=UTC),
        "responded_by_user": {"id": "7", "name": "ada"},
        **changed,
    }


def test_every_ranking_is_an_option_and_nothing_else_but_tie_and_skip() -> None:
    assert options(2) == ["A", "B", TIE, SKIP]
    assert options(3)[:2] == ["A > B > C", "A > C > B"]
    assert [len(set(options(count))) for count in (2, 3, 4)] == [4, 8, 26]


def test_the_order_is_random_over_prompts_and_the_same_every_time() -> None:
    orders = [shown_order(2, seed=1, prompt_id=f"prompt-{number}") for number in range(400)]
    assert orders == [shown_order(2, seed=1, prompt_id=f"prompt-{number}") for number in range(400)]
    assert 160 < sum(order == [0, 1] for order in orders) < 240
    assert {tuple(shown_order(3, seed=1, prompt_id=str(n))) for n in range(200)} == set(permutations(range(3)))


def test_the_question_shows_what_stands_behind_each_letter_and_what_is_written_stays_text() -> None:
    row = {"prompt": "# not a heading\n```\n![x](http://evil)", "responses": ["first", "```\nsecond"]}
    text = body(row, [1, 0])
    assert text.index("### A\n\n````text\n```\nsecond\n````") < text.index("### B\n\n```text\nfirst\n```")
    assert "````text\n# not a heading\n```\n![x](http://evil)\n````" in text


@pytest.mark.parametrize(
    ("order", "option", "outcome", "ranking"),
    [
        ([1, 0], "A", Outcome.ANSWERED, [1, 0]),
        ([1, 0], "B", Outcome.ANSWERED, [0, 1]),
        ([2, 0, 1], "C > A > B", Outcome.ANSWERED, [1, 2, 0]),
        ([1, 0], TIE, Outcome.TIE, []),
        ([1, 0], SKIP, Outcome.SKIPPED, []),
    ],
)
def test_an_answer_is_about_the_responses_and_not_about_the_letters(
    order: list[int], option: str, outcome: Outcome, ranking: list[int]
) -> None:
    answer = read_answer({"index": 3, "order": order}, event(option), timed_out=False)
    assert (answer["outcome"], answer["ranking"], answer["order"]) == (outcome, ranking, order)
    assert (answer["by"], answer["at"], answer["reasons"], answer["comment"]) == (
        "ada",
        "2026-11-24T09:30:00+00:00",
        ["honest"],
        "clear",
    )


def test_silence_is_not_a_skip() -> None:
    given = event(SKIP, responded_by_user=None, params_input={})
    answer = read_answer({"index": 0, "order": [0, 1]}, given, timed_out=True)
    assert (answer["outcome"], answer["by"]) == (Outcome.UNANSWERED, "")


def test_a_ranking_of_four_gives_its_six_ordered_pairs() -> None:
    row = {"id": "p", "prompt": "Why?", "responses": ["w", "x", "y", "z"]}
    answer = read_answer({"index": 0, "order": [3, 2, 1, 0]}, event("B > A > D > C"), timed_out=False)
    pairs = [(pair["chosen"], pair["rejected"]) for pair in pairs_of(row, answer)]
    assert pairs == [("y", "z"), ("y", "w"), ("y", "x"), ("z", "w"), ("z", "x"), ("w", "x")]


def answers_to(store: Store, ref: ArtifactRef, rows: list[dict[str, Any]], given: Sequence[str | None]) -> list[Any]:
    """What the tasks `rate` leave: a result each, or nothing where the task failed."""
    asked = make_questions(ref.model_dump(mode="json"), store, run_info())
    results = [
        None if option is None else read_answer(question, event(option), timed_out=False)
        for question, option in zip(asked, given, strict=True)
    ]
    return complete(rows, results, asked)


def test_what_was_asked_is_answered_tied_skipped_or_unanswered_and_all_of_it_is_kept(tmp_path: Path) -> None:
    store, ref, rows = respond(tmp_path)
    answers = answers_to(store, ref, rows, ["A", "B", TIE, SKIP, None, "A"])
    made, manifest = publish_preferences(store, ref, answers, run=run_info())
    assert manifest.ledger == {
        "questions": {"asked": 6, "answered": 3, "tie": 1, "skipped": 1, "unanswered": 1},
        "pairs": 3,
    }
    table = read_file(made, "answers.csv").decode().splitlines()
    assert len(table) == 7
    assert table[5].startswith("prompt-4,unanswered,")
    assert [(entry.role, entry.kind) for entry in read_manifest(made).inputs] == [
        ("responses", "responses"),
        ("model", "dpo-model"),
    ]


def test_the_same_answers_are_the_same_artifact_and_others_another(tmp_path: Path) -> None:
    store, ref, rows = respond(tmp_path)
    first, again, other = (
        publish_preferences(store, ref, answers_to(store, ref, rows, given), run=run_info())[0]
        for given in (["A"] * 6, ["A"] * 6, ["B"] * 6)
    )
    assert first == again
    assert other.uri != first.uri
    assert other.digest != first.digest


def test_answers_that_prefer_nothing_are_an_error_that_counts_them(tmp_path: Path) -> None:
    store, ref, rows = respond(tmp_path)
    with pytest.raises(StageDataFailed, match="'tie': 5, 'skipped': 1"):
        publish_preferences(store, ref, answers_to(store, ref, rows, [TIE] * 5 + [SKIP]), run=run_info())


def test_every_pair_arrives_in_the_tokens_that_the_reward_stage_trains_on(tmp_path: Path) -> None:
    """The artifact's URI is a `preferences` source as it is; curate and tokenize are the real ones."""
    from stages import curate, tokenize
    from stages.config.tokens import TokenizeConfig
    from stages.data.tokens.views import Split, TokensArtifact
    from tests.small_world import make_context, published, write_curated

    store, ref, rows = respond(tmp_path, responses=3)
    made, _ = publish_preferences(store, ref, answers_to(store, ref, rows, ["A > B > C"] * 6), run=run_info())
    home = tmp_path / "world"
    context = make_context(home, Stage.CURATE, CurateConfig())
    write_curated(context.output_dir)  # documents and instructions; the preferences are replaced
    config = CurateConfig(packages=("click", "jinja2"), heldout_packages=("click",), preferences=(made.uri,), planted=0)
    curated = tmp_path / "curated"
    curated.mkdir()
    outcome = curate.run(
        cast(
            Any,
            SimpleNamespace(
                config=config,
                inputs={},
                execution=ExecutionConfig(),
                work_dir=tmp_path / "work",
                output_dir=curated,
                progress=lambda done, total, unit="", **numbers: None,
            ),
        )
    )
    read = outcome.ledger["preferences"]["steps"][0]
    assert (read["in"]["documents"], read["kept"]["documents"]) == (18, 18), "the artifact holds pairs and nothing else"
    arrived: Counter[tuple[str, str]] = Counter()
    for split in ("train", "heldout"):
        target = context.output_dir / "preferences" / f"{split}.jsonl.gz"
        target.write_bytes((curated / "preferences" / f"{split}.jsonl.gz").read_bytes())
        for line in gzip.decompress(target.read_bytes()).decode().splitlines():
            arrived[(json.loads(line)["chosen"], json.loads(line)["rejected"])] += 1
            assert json.loads(line)["reason"] == "honest\nclear", "the rater's tags, and the rater's words"
    published_pairs = [json.loads(line) for line in read_file(made, "preferences.jsonl").decode().splitlines()]
    assert len(published_pairs) == 18
    assert arrived == Counter((pair["chosen"], pair["rejected"]) for pair in published_pairs)
    settings = TokenizeConfig(vocab_size=300, sequence_length=128, max_prompt_length=96, bpe_train_bytes=10_000)
    tokenizing = make_context(home, Stage.TOKENIZE, settings, {"curated": published(context)})
    tokenize.run(tokenizing)
    tokens = TokensArtifact(tokenizing.output_dir)
    assert sum(len(tokens.pairs(split)) for split in Split) == 18


def test_a_response_may_hold_what_ends_a_line_only_in_unicode(tmp_path: Path) -> None:
    store, _, rows = respond(tmp_path / "a")
    rows[0]["responses"][0] = "one\u2028two\x85three"
    folder = tmp_path / "b"
    folder.mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)  # as the stage writes it
    (folder / "responses.jsonl").write_text(lines, encoding="utf-8")
    ref, _ = publish_artifact(store, Stage.RESPOND, {}, folder, salt="b")
    assert read_responses(ref) == rows


def test_a_question_can_be_stored_and_encoded_whatever_was_written(tmp_path: Path) -> None:
    """PostgreSQL refuses NUL in a text, and UTF-8 has no half characters."""
    store, _, rows = respond(tmp_path / "a")
    rows[0] |= {"prompt": "a\x00b\ud800", "responses": ["c\x00", "\udfffd"]}
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ref, _ = publish_artifact(store, Stage.RESPOND, {}, folder, salt="b")
    titles = [question["title"] for question in make_questions(ref.model_dump(), store, run_info())]
    for text in (titles[0], body(rows[0], [0, 1])):
        assert b"\0" not in text.encode()
    assert titles[0] == "a\\u0000b\\ud800"
