"""Who becomes champion, and why: every branch of the decision with numbers a reader can redo."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from stages.config.closing import Approval, Guard, PromoteConfig, Promotion, Verdict
from stages.config.decision import Candidate, Champion, Decision, decide
from stages.config.decision_table import HEAD, decision_rows, suite_rows
from stages.config.errors import ConfigError, DataError
from stages.config.evaluation import Conditions, Evaluation
from tests.comparisons import CHAMPION, TIE, WORSE, compared, with_comparisons
from tests.pipeline_records import EVALUATION

AUTO = PromoteConfig(run_name="demo")
GUARDED = PromoteConfig(run_name="demo", guards=(Guard(suite="language", margin=0.1),))
OLD = Champion("4", "old")
PPO, DPO = Candidate("ppo", "new-ppo"), Candidate("dpo", "new-dpo")


def evaluated(*comparisons: Mapping[str, Any], champion: Mapping[str, Any] | None = CHAMPION) -> Evaluation:
    report = with_comparisons(EVALUATION, *comparisons, champion=champion)
    return Evaluation.from_report(json.loads(json.dumps(report)), settings_digest="s", uri="u")


def judged(*comparisons: Mapping[str, Any], config: PromoteConfig = AUTO, candidate: Candidate = PPO) -> Decision:
    """One candidate against the champion."""
    return decide([candidate], OLD, evaluated(*comparisons), config)


def test_a_candidate_that_is_better_than_the_champion_is_promoted_with_all_numbers() -> None:
    decision = judged(compared())
    assert (decision.promoted, decision.chosen, decision.comparison) == (True, "ppo", "champion")
    assert decision.reason == (
        "PPO against the champion (version 4) at level 0.05: pairs (accuracy) +0.06 [+0.03, +0.09], p=0.001, "
        "400 items: it is better"
    )
    record = json.loads(json.dumps(decision.record()))
    found = record["rulings"][0]["primary"]["compared"]
    assert {key: found[key] for key in ("difference", "low", "high", "p", "items", "needed_items")} == {
        "difference": 0.06,
        "low": 0.03,
        "high": 0.09,
        "p": 0.001,
        "items": 400,
        "needed_items": 120,
    }


@pytest.mark.parametrize(
    "numbers",
    [TIE, WORSE, {"low": 0.0}, {"p": 0.06}],
    ids=["a tie", "worse", "the bound is zero", "p is above the level"],
)
def test_what_is_not_shown_to_be_better_is_not_promoted(numbers: dict[str, Any]) -> None:
    decision = judged(compared(**numbers))
    assert (decision.promoted, decision.comparison) == (False, "champion")
    assert "it is not shown to be better" in decision.reason


def test_the_reason_says_how_many_items_would_have_been_needed() -> None:
    assert "; 3000 items would show it with power 0.9" in judged(compared(**TIE)).reason
    assert "items would" not in judged(compared(**WORSE)).reason


def test_without_a_champion_the_model_that_it_started_from_is_the_opponent() -> None:
    evaluation = evaluated(compared(against="sft"), champion=None)
    decision = decide([PPO], None, evaluation, AUTO)
    assert (decision.promoted, decision.comparison) == (True, "start")
    assert "against the model that it started from" in decision.reason
    against_base = evaluated(compared(against="base", **TIE), champion=None)
    assert not decide([PPO], None, against_base, AUTO).promoted


def test_a_win_over_the_start_is_no_win_over_the_champion() -> None:
    decision = judged(compared(against="sft"), compared(**TIE))
    assert not decision.promoted
    only_start = judged(compared(against="sft"))
    assert (only_start.promoted, only_start.comparison) == (False, "none")
    assert "pairs: not measured on both" in only_start.reason


def test_the_first_suite_that_both_have_decides() -> None:
    gold_is_worse = judged(compared(suite="gold", **WORSE), compared())
    assert not gold_is_worse.promoted
    assert gold_is_worse.ruling.primary.suite == "gold"  # pyright: ignore[reportOptionalMemberAccess]
    assert judged(compared(suite="gold"), compared(**WORSE)).promoted
    assert judged(compared(suite="judge"), compared(**WORSE)).promoted


def test_ppo_is_never_judged_by_the_reward_model_that_it_optimised_and_dpo_may_be() -> None:
    config = PromoteConfig(primary=("score",))
    ppo = judged(compared(suite="score"), config=config)
    assert (ppo.promoted, ppo.comparison) == (False, "none")
    assert "score: it was trained against this reward model" in ppo.reason
    assert judged(compared("dpo", suite="score"), config=config, candidate=DPO).promoted
    then_pairs = PromoteConfig(primary=("score", "pairs"))
    assert not judged(compared(suite="score"), compared(**TIE), config=then_pairs).promoted


def test_a_judge_that_guesses_at_known_pairs_decides_nothing() -> None:
    def by_judge(**judge: Any) -> Decision:
        report = with_comparisons(EVALUATION, compared(suite="judge"), compared(**TIE), champion=CHAMPION)
        evaluation = Evaluation.from_report({**report, "judge": judge}, settings_digest="s")
        return decide([PPO], OLD, evaluation, AUTO)

    assert by_judge(better_than_chance=True).promoted
    guesses = by_judge(better_than_chance=False)
    assert not guesses.promoted
    assert guesses.ruling.primary.suite == "pairs"  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("agreement", "decides"),
    [
        ({"value": 0.6, "low": 0.51, "high": 0.7, "items": 400}, "gold"),
        ({"value": 0.55, "low": 0.5, "high": 0.6, "items": 400}, "pairs"),
        ({"value": 1.0, "low": 1.0, "high": 1.0, "items": 1}, "pairs"),
        ({"items": 0, "skipped": {"no_text_for_another_tokenizer": 400}}, "gold"),
    ],
    ids=["proven", "guesses", "one pair", "none that it could read"],
)
def test_a_gold_scorer_that_guesses_at_known_pairs_decides_nothing(agreement: dict[str, Any], decides: str) -> None:
    report = with_comparisons(EVALUATION, compared(suite="gold"), compared(**TIE), champion=CHAMPION)
    report["suites"]["gold_agreement"] = {"metric": "accuracy", "better": "higher", "roles": {"gold": agreement}}
    decision = decide([PPO], OLD, Evaluation.from_report(report, settings_digest="s"), AUTO)
    assert decision.ruling is not None
    assert decision.ruling.primary is not None
    assert decision.ruling.primary.suite == decides
    assert decision.promoted is (decides == "gold")


def test_on_a_suite_where_lower_is_better_the_upper_bound_counts() -> None:
    config = PromoteConfig(primary=("language",))
    gain = {"suite": "language", "difference": -0.06, "low": -0.09, "high": -0.03}
    assert judged(compared(**gain), config=config).promoted
    assert not judged(compared(**{**gain, "high": 0.001}), config=config).promoted
    assert "lower is better" in judged(compared(**gain), config=config).reason


def test_a_suite_without_a_better_way_decides_nothing() -> None:
    decision = judged(compared(suite="length"), config=PromoteConfig(primary=("length",)))
    assert not decision.promoted
    assert "neither better high nor low" in decision.reason
    guarded = PromoteConfig(guards=(Guard(suite="length", margin=1e9),))
    assert not judged(compared(), compared(suite="length"), config=guarded).promoted


@pytest.mark.parametrize(("high", "promoted"), [(0.1, True), (0.1001, False)])
def test_a_guard_holds_by_the_bound_and_not_by_the_difference(high: float, promoted: bool) -> None:
    """Bits per byte rose by 0.05; what counts is that they may have risen by `high`."""
    decision = judged(
        compared(), compared(suite="language", difference=0.05, low=0.0, high=high, p=0.9), config=GUARDED
    )
    assert decision.promoted is promoted
    if promoted:
        assert decision.reason.endswith("it is better; guards hold: language")
    else:
        assert "it may be worse by 0.1001, over its margin 0.1" in decision.reason


@pytest.mark.parametrize(("missing", "promoted"), [(8, True), (9, False)])
def test_a_candidate_may_lack_two_in_a_hundred_of_the_items_that_its_opponent_has(missing: int, promoted: bool) -> None:
    """Of 400 + 8 items 8 are 1.96 %; of 400 + 9 they are 2.2 %."""
    decision = judged(compared(missing=missing))
    assert decision.promoted is promoted
    wrong = "it has no score on 9 of the 409 items that the other has one on, and at most 2% may be missing"
    assert (wrong in decision.reason) is not promoted
    held = compared(suite="language", difference=0.0, low=-0.01, high=0.01, missing=missing)
    guarded = judged(compared(), held, config=GUARDED)
    assert guarded.promoted is promoted
    assert (
        f"guard language (bits_per_byte) +0 [-0.01, +0.01], lower is better, p=0.001, 400 items: {wrong}"
        in guarded.reason
    ) is not promoted
    margin = PromoteConfig(margin=0.03)
    assert judged(compared(missing=missing), config=margin).promoted is promoted


def test_why_a_candidate_has_no_score_is_said_and_the_table_counts_the_items() -> None:
    report = with_comparisons(EVALUATION, compared(items=200, missing=200), champion=CHAMPION)
    report["suites"]["pairs"]["roles"]["ppo"]["skipped"] = {"rule_failed_ValueError": 200}
    decision = decide([PPO], OLD, Evaluation.from_report(report, settings_digest="s"), AUTO)
    assert not decision.promoted
    assert decision.reason.endswith("may be missing (skipped: rule_failed_ValueError 200)")
    assert decision_rows(decision)[0][HEAD.index("items")] == "200, 200 missing"


def test_a_candidate_without_any_score_on_the_primary_suite_is_not_judged_by_the_next_one() -> None:
    report = with_comparisons(EVALUATION, compared(), compared(suite="gold", against="dpo"), champion=CHAMPION)
    report["suites"]["gold"]["roles"]["ppo"] = {"items": 0, "skipped": {"not_finite": 400}}
    decision = decide([PPO], OLD, Evaluation.from_report(report, settings_digest="s"), AUTO)
    assert not decision.promoted
    assert "gold: it has no score on any of the 400 items that the other has one on (skipped: not_finite 400)" in (
        decision.reason
    )
    report["suites"]["gold"]["roles"]["champion"] = {"items": 0, "skipped": {"no_text_for_another_tokenizer": 400}}
    assert decide([PPO], OLD, Evaluation.from_report(report, settings_digest="s"), AUTO).promoted, "by pairs"


def test_a_guard_that_only_one_of_the_two_was_measured_on_does_not_hold() -> None:
    decision = judged(compared(), compared(against="sft", suite="language"), config=GUARDED)
    assert not decision.promoted
    assert "guard language is not held: the two were not measured on items that both have" in decision.reason


def test_a_guard_on_a_suite_that_the_run_does_not_have_is_told_and_blocks_nothing() -> None:
    decision = judged(compared(), config=GUARDED)
    assert decision.promoted
    assert decision.reason.endswith("it is better; guards that no model could be measured on: language")
    assert decision_rows(decision)[1][-1] == "not measured"
    report = with_comparisons(EVALUATION, compared(), compared(suite="language"), champion=CHAMPION)
    report["suites"]["language"]["roles"] = {role: {"items": 0} for role in ("ppo", "champion")}
    report["comparisons"].pop()
    nobody = decide([PPO], OLD, Evaluation.from_report(report, settings_digest="s"), GUARDED)
    assert (nobody.promoted, nobody.reason) == (True, decision.reason)
    report["suites"]["language"]["roles"]["champion"]["items"] = 400
    assert not decide([PPO], OLD, Evaluation.from_report(report, settings_digest="s"), GUARDED).promoted


def test_a_guard_of_a_name_that_the_evaluation_does_not_know_is_not_held() -> None:
    decision = judged(compared(), config=PromoteConfig(guards=(Guard(suite="langauge", margin=0.1),)))
    assert not decision.promoted
    assert "guard langauge is not held: the evaluation has no suite of this name" in decision.reason


def test_few_items_decide_nothing_and_hold_no_guard() -> None:
    few = judged(compared(items=400, clusters=19))
    assert "19 independent items are too few (promote.min_items=20)" in few.reason
    assert not few.promoted
    guard = compared(suite="language", difference=0.0, low=0.0, high=0.0, clusters=19)
    assert not judged(compared(), guard, config=GUARDED).promoted


def test_intervals_for_a_looser_level_than_the_stated_one_decide_nothing() -> None:
    decision = judged(compared(level=0.06))
    assert not decision.promoted
    assert "its interval is for level 0.06, not 0.05; clear the task `evaluate`" in decision.reason


def test_a_margin_promotes_what_keeps_up() -> None:
    config = PromoteConfig(margin=0.03)
    assert judged(compared(**TIE), config=config).promoted
    assert not judged(compared(**{**TIE, "low": -0.03}), config=config).promoted
    assert "over promote.margin=0.03" in judged(compared(**WORSE), config=config).reason


def test_two_candidates_share_the_level() -> None:
    one = [compared(p=0.03)]
    assert judged(*one).promoted
    both = decide([PPO, DPO], OLD, evaluated(*one, compared("dpo", **TIE)), AUTO)
    assert not both.promoted, "0.03 is above 0.05 / 2"
    assert "at level 0.025 (promote.level=0.05, shared by 2)" in both.reason


def test_of_two_candidates_one_that_passes_is_chosen_then_the_one_that_is_better_at_least() -> None:
    def chosen(*comparisons: Mapping[str, Any], config: PromoteConfig = AUTO) -> str | None:
        return decide([PPO, DPO], OLD, evaluated(*comparisons), config).chosen

    assert chosen(compared(**TIE), compared("dpo")) == "dpo"
    assert chosen(compared(low=0.03), compared("dpo", low=0.04)) == "dpo"
    assert chosen(compared(), compared("dpo")) == "ppo", "the first of equals"
    broken = compared(suite="language", difference=0.5, low=0.4, high=0.6)
    held = compared("dpo", suite="language", difference=0.0, low=-0.01, high=0.01)
    assert chosen(compared(low=0.05), broken, compared("dpo"), held, config=GUARDED) == "dpo"
    by_score = PromoteConfig(primary=("score", "pairs"))
    assert chosen(compared(low=0.05), compared("dpo", suite="score"), config=by_score) == "dpo"
    assert decide([], OLD, evaluated(), AUTO) == Decision(False, "the run has no aligned model", "none")


def test_a_champion_that_changed_since_the_evaluation_is_not_dethroned() -> None:
    evaluation = evaluated(compared())
    changed = decide([PPO], Champion("5", "newer"), evaluation, AUTO)
    assert (changed.promoted, changed.comparison) == (False, "none")
    assert "it was compared with version 4, and version 5 is champion now; clear the task `evaluate`" in changed.reason
    gone = decide([PPO], None, evaluation, AUTO)
    assert not gone.promoted
    assert "there is no champion any more" in gone.reason
    first = decide([PPO], OLD, evaluated(compared(against="sft"), champion=None), AUTO)
    assert not first.promoted
    assert "there was no champion to compare with, and version 4 is champion now" in first.reason


def test_without_a_comparison_with_the_champion_the_best_against_the_start_is_still_the_one_proposed() -> None:
    evaluation = evaluated(compared(against="sft", **TIE), compared("dpo", "sft"), champion=None)
    for config in (AUTO, AUTO.model_copy(update={"promotion": Promotion.NEVER})):
        decision = decide([PPO, DPO], OLD, evaluation, config)
        assert (decision.promoted, decision.comparison, decision.chosen) == (False, "none", "dpo")


def test_a_champion_built_again_with_other_content_is_another_one() -> None:
    evaluation = evaluated(compared(), champion={**CHAMPION, "digest": "d1"})
    assert decide([PPO], Champion("4", "old", "d1"), evaluation, AUTO).promoted
    assert not decide([PPO], Champion("4", "old", "d2"), evaluation, AUTO).promoted


def test_a_champion_that_could_not_be_measured_stays_and_the_reason_says_why() -> None:
    evaluation = evaluated(
        compared(against="sft"), champion={"missing": "models:/demo-aligned/4: there is no artifact"}
    )
    decision = decide([PPO], OLD, evaluation, AUTO)
    assert (decision.promoted, decision.comparison) == (False, "none")
    assert "could not be measured (models:/demo-aligned/4: there is no artifact)" in decision.reason
    assert decide([PPO], OLD, evaluation, asked(Verdict.APPROVED)).promoted


def test_the_champion_itself_stays_champion_unless_its_rival_of_the_same_run_beats_it() -> None:
    own = Champion("4", "new-ppo")
    alone = decide([PPO], own, evaluated(champion=None), AUTO)
    assert (alone.promoted, alone.comparison, alone.chosen) == (True, "same_model", "ppo")
    stays = decide([DPO, PPO], own, evaluated(compared("dpo", "ppo", **TIE), champion=None), AUTO)
    assert (stays.promoted, stays.comparison, stays.chosen) == (True, "same_model", "ppo")
    beaten = decide([DPO, PPO], own, evaluated(compared("dpo", "ppo"), champion=None), AUTO)
    assert (beaten.promoted, beaten.comparison, beaten.chosen) == (True, "champion", "dpo")


def test_a_model_that_was_rolled_back_needs_a_person() -> None:
    candidate = Candidate("ppo", "new-ppo", rolled_back="it insults people")
    decision = judged(compared(), candidate=candidate)
    assert not decision.promoted
    assert "it was champion and was rolled back (it insults people), so only a person promotes it" in decision.reason
    assert decide([candidate], OLD, evaluated(compared()), asked(Verdict.APPROVED)).promoted


def test_promotion_never_promotes_nothing_however_good() -> None:
    decision = judged(compared(), config=AUTO.model_copy(update={"promotion": Promotion.NEVER}))
    assert (decision.promoted, decision.comparison, decision.chosen) == (False, "none", "ppo")
    assert "promotion=never" in decision.reason


def test_an_evaluation_of_before_there_were_comparisons_promotes_nothing() -> None:
    evaluation = Evaluation.from_report(EVALUATION, settings_digest="s")
    decision = decide([PPO, DPO], None, evaluation, AUTO)
    assert (decision.promoted, decision.comparison, decision.chosen) == (False, "none", "ppo")


def asked(verdict: Verdict, comment: str = "", by: str = "ada") -> PromoteConfig:
    approval = Approval(verdict=verdict, by=by, at="2026-11-24T09:30:15+00:00", comment=comment)
    return AUTO.model_copy(update={"promotion": Promotion.APPROVAL, "approval": approval})


def test_a_person_overrides_the_numbers_in_both_directions_and_the_reason_tells_both() -> None:
    approved = judged(compared(**TIE), config=asked(Verdict.APPROVED, "reads better"))
    rejected = judged(compared(), config=asked(Verdict.REJECTED))
    assert (approved.promoted, approved.comparison) == (True, "person")
    assert (rejected.promoted, rejected.comparison) == (False, "person")
    assert approved.reason.startswith(
        "approved by ada at 2026-11-24T09:30:15+00:00: reads better; the numbers disagree: PPO against the champion"
    )
    assert "it is not shown to be better" in approved.reason
    assert "the numbers agree" in judged(compared(), config=asked(Verdict.APPROVED)).reason
    assert rejected.ruling is not None, "the numbers stay on record"


def test_silence_is_a_rejection_that_says_so() -> None:
    decision = judged(compared(), config=asked(Verdict.TIMED_OUT, by=""))
    assert not decision.promoted
    assert decision.reason.startswith("no decision until 2026-11-24T09:30:15+00:00, which counts as a rejection;")


def test_approving_the_champion_moves_no_alias_and_rejecting_it_promotes_nothing() -> None:
    own, evaluation = Champion("4", "new-ppo"), evaluated(champion=None)
    kept = decide([PPO], own, evaluation, asked(Verdict.APPROVED))
    refused = decide([PPO], own, evaluation, asked(Verdict.REJECTED))
    assert (kept.promoted, kept.comparison) == (True, "same_model")
    assert (refused.promoted, refused.comparison) == (False, "person")


def test_approval_without_an_answer_is_an_error_that_says_what_to_clear() -> None:
    with pytest.raises(ConfigError, match=r"promote\.approval is empty") as caught:
        judged(compared(), config=AUTO.model_copy(update={"promotion": Promotion.APPROVAL}))
    assert "`approve`" in caught.value.advice


def test_the_table_has_a_row_for_each_suite_that_decided() -> None:
    guard = compared(suite="language", difference=0.05, low=0.0, high=0.2, p=0.9, needed_items=None)
    rows = decision_rows(judged(compared(), guard, config=GUARDED))
    assert all(len(row) == len(HEAD) for row in rows)
    assert rows == [
        ("PPO", "Champion", "pairs, accuracy ↑", "+0.06", "+0.03 to +0.09", "0.001", "400", "120", "better", "passes"),
        (
            *("PPO", "Champion", "language, bits_per_byte ↓", "+0.05", "+0 to +0.2", "0.9", "400", "–"),
            *("at most 0.1 worse", "not held"),
        ),
    ]
    (unknown,) = decision_rows(decide([PPO], OLD, evaluated(champion=None), AUTO))
    assert (len(unknown), unknown[-1]) == (len(HEAD), "not comparable")


def test_suites_are_told_with_their_intervals() -> None:
    rows = suite_rows(evaluated(compared()).suites, ["ppo", "champion", "base"])
    assert rows == [("pairs, accuracy ↑", "0.6 [0.55, 0.65]", "0.6 [0.55, 0.65]", "–")]


def test_values_that_are_not_finite_numbers_are_left_out() -> None:
    report = json.loads(
        '{"models": {"ppo": {"eval/win_rate": NaN, "eval/score_mean": 0.5, "note": "x"}}, "data": {"digest": "d"}}'
    )
    evaluation = Evaluation.from_report(report, settings_digest="s")
    assert evaluation.of("ppo") == {"eval/score_mean": 0.5}
    assert evaluation.conditions == Conditions(data_digest="d", settings_digest="s")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"comparisons": [{"role": "ppo"}]}, r"comparisons is not valid: 0\.against"),
        ({"comparisons": [compared(low=float("nan"))]}, r"comparisons is not valid: 0\.low"),
        ({"comparisons": [compared(items=-1)]}, r"comparisons is not valid: 0\.items"),
        ({"suites": {"pairs": {"better": "sideways"}}}, r"suites is not valid: pairs\.better"),
        ({"champion": 4}, "champion is not valid"),
        ({"models": 3}, "models"),
    ],
)
def test_a_report_that_is_not_what_it_should_be_is_an_error_that_names_the_field(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError, match=named):
        Evaluation.from_report({**EVALUATION, **changes}, settings_digest="s")


def test_conditions_survive_as_tags_and_an_unknown_one_replaces_what_was_there() -> None:
    known = Conditions("d1", "r1", "s1", "u1")
    unknown = Conditions(data_digest="d", settings_digest="s")
    assert known.tags()["evaluation.uri"] == "u1"
    assert Conditions.from_tags(unknown.tags()) == unknown
    assert Conditions.from_tags(known.tags() | unknown.tags()) == unknown


def test_a_champion_is_read_from_the_tags_of_its_version() -> None:
    tags = {"lineage.fingerprint": "old", "lineage.digest": "d", "alignment": "ppo"}
    assert Champion.from_tags("4", tags) == Champion("4", "old", "d")


def test_a_stored_configuration_with_the_earlier_rule_is_read_and_its_rule_is_gone() -> None:
    stored = json.loads(AUTO.model_dump_json()) | {"min_win_rate": 0.7}
    assert PromoteConfig.model_validate(stored) == AUTO


def test_suites_are_named_once() -> None:
    with pytest.raises(ValueError, match="pairs stands there twice"):
        PromoteConfig(primary=("pairs", "pairs"))
    with pytest.raises(ValueError, match="language has two margins"):
        PromoteConfig(guards=(Guard(suite="language", margin=1.0), Guard(suite="language", margin=2.0)))
