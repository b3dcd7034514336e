"""Who becomes champion, and why: every branch of the decision with numbers a reader can redo."""

import json
from dataclasses import replace

import pytest

from stages.config.closing import Approval, PromoteConfig, Promotion, Verdict
from stages.config.decision import Candidate, Champion, Conditions, Evaluation, choose_aligned, decide
from stages.config.errors import ConfigError, DataError
from tests.pipeline_records import EVALUATION

AUTO = PromoteConfig(run_name="demo")
CONDITIONS = Conditions("d1", "r1", "s1")


def candidate(metrics: dict[str, float], fingerprint: str = "new", conditions: Conditions = CONDITIONS) -> Candidate:
    return Candidate(fingerprint, metrics, conditions)


def champion(score: float | None = 0.2, **changed: str) -> Champion:
    metrics = {} if score is None else {"eval/score_mean": score}
    return Champion("4", "old", metrics, replace(CONDITIONS, **changed))


def test_without_a_champion_the_win_rate_decides() -> None:
    wins = decide(candidate({"eval/win_rate": 0.5}), None, AUTO)
    loses = decide(candidate({"eval/win_rate": 0.49}), None, AUTO)
    assert (wins.promoted, loses.promoted) == (True, False)
    assert wins.reason == (
        "there is no champion yet; win rate 0.500 against the model that it started from reaches min_win_rate=0.5"
    )
    assert "is below min_win_rate=0.5" in loses.reason


def test_a_comparable_champion_is_beaten_by_a_higher_score_only() -> None:
    metrics = {"eval/score_mean": 0.3, "eval/win_rate": 0.1}
    better = decide(candidate(metrics), champion(0.2), AUTO)
    worse = decide(candidate(metrics | {"eval/win_rate": 0.99}), champion(0.4), AUTO)
    equal = decide(candidate(metrics), champion(0.3), AUTO)
    assert (better.promoted, worse.promoted, equal.promoted) == (True, False, False)
    assert {better.comparison, worse.comparison, equal.comparison} == {"score"}
    assert "0.3000 beats 0.2000 of the champion (version 4)" in better.reason


@pytest.mark.parametrize(
    "old",
    [
        champion(9.0, data_digest="d2"),
        champion(9.0, reward_fingerprint="r2"),
        champion(9.0, settings_digest="s2"),
        champion(9.0, data_digest=""),
        champion(None),
    ],
    ids=["other data", "other reward model", "other settings", "nothing recorded", "no score"],
)
def test_scores_that_do_not_compare_fall_back_to_the_win_rate_and_say_so(old: Champion) -> None:
    decision = decide(candidate({"eval/score_mean": 0.1, "eval/win_rate": 0.7}), old, AUTO)
    assert decision.promoted
    assert decision.comparison == "win_rate"
    assert "do not compare" in decision.reason


def test_an_evaluation_that_does_not_name_its_data_compares_with_nothing() -> None:
    unknown = candidate({"eval/score_mean": 0.9, "eval/win_rate": 0.2}, conditions=Conditions())
    decision = decide(unknown, Champion("4", "old", {"eval/score_mean": 0.1}, Conditions()), AUTO)
    assert (decision.promoted, decision.comparison) == (False, "win_rate")


def test_promotion_never_promotes_nothing_however_good() -> None:
    config = AUTO.model_copy(update={"promotion": Promotion.NEVER})
    decision = decide(candidate({"eval/win_rate": 1.0, "eval/score_mean": 99.0}), champion(0.0), config)
    assert (decision.promoted, decision.comparison) == (False, "none")
    assert "promotion=never" in decision.reason


def test_a_model_without_measurements_is_not_promoted() -> None:
    decision = decide(candidate({}), None, AUTO)
    assert not decision.promoted
    assert "no reward model has judged" in decision.reason
    assert "no held-out preference pairs" in decision.reason


def test_the_champion_itself_stays_champion() -> None:
    decision = decide(candidate({"eval/score_mean": 0.0}, "old"), champion(0.2), AUTO)
    assert (decision.promoted, decision.comparison) == (True, "same_model")


def test_the_aligned_model_with_the_higher_win_rate_is_chosen_and_the_score_breaks_ties() -> None:
    assert choose_aligned(["ppo", "dpo"], read_from(EVALUATION)) == "ppo"
    tie = Evaluation(
        {"ppo": {"eval/win_rate": 0.6, "eval/score_mean": 0.1}, "dpo": {"eval/win_rate": 0.6, "eval/score_mean": 0.2}}
    )
    assert choose_aligned(["ppo", "dpo"], tie) == "dpo"
    assert choose_aligned(["ppo", "dpo"], Evaluation({"dpo": {"eval/win_rate": 0.0}})) == "dpo"
    assert choose_aligned([], tie) is None


def read_from(data: dict) -> Evaluation:
    return Evaluation({role: values for role, values in data["models"].items()})


def test_values_that_are_not_finite_numbers_do_not_rank() -> None:
    report = json.loads(
        '{"models": {"ppo": {"eval/win_rate": NaN, "eval/score_mean": 0.5, "note": "x"}}, "data": {"digest": "d"}}'
    )
    evaluation = Evaluation.from_report(report, settings_digest="s")
    assert evaluation.of("ppo") == {"eval/score_mean": 0.5}
    assert evaluation.conditions == Conditions(data_digest="d", settings_digest="s")


def test_conditions_survive_as_tags_and_an_unknown_one_replaces_what_was_there() -> None:
    unknown = Conditions(data_digest="d", settings_digest="s")
    assert Conditions.from_tags(unknown.tags()) == unknown
    assert Conditions.from_tags(CONDITIONS.tags() | unknown.tags()) == unknown


def test_an_evaluation_without_models_is_an_error_about_the_data() -> None:
    with pytest.raises(DataError, match="models"):
        Evaluation.from_report({"models": 3}, settings_digest="s")


def test_a_champion_is_read_from_the_tags_of_its_version() -> None:
    tags = {"lineage.fingerprint": "old", "eval/score_mean": "0.2", "eval/note": "x", "alignment": "ppo"}
    assert Champion.from_tags("4", tags | CONDITIONS.tags()) == champion(0.2)


def asked(verdict: Verdict, comment: str = "", by: str = "ada") -> PromoteConfig:
    approval = Approval(verdict=verdict, by=by, at="2026-11-24T09:30:15+00:00", comment=comment)
    return AUTO.model_copy(update={"promotion": Promotion.APPROVAL, "approval": approval})


def test_a_person_overrides_the_numbers_in_both_directions_and_the_reason_tells_both() -> None:
    good, bad = {"eval/win_rate": 0.9}, {"eval/win_rate": 0.1}
    approved = decide(candidate(bad), None, asked(Verdict.APPROVED, "reads better"))
    rejected = decide(candidate(good), None, asked(Verdict.REJECTED))
    assert (approved.promoted, approved.comparison) == (True, "person")
    assert (rejected.promoted, rejected.comparison) == (False, "person")
    assert approved.reason.startswith(
        "approved by ada at 2026-11-24T09:30:15+00:00: reads better; the numbers disagree: there is no champion"
    )
    assert "is below min_win_rate=0.5" in approved.reason
    assert "the numbers agree" in decide(candidate(good), None, asked(Verdict.APPROVED)).reason


def test_silence_is_a_rejection_that_says_so() -> None:
    decision = decide(candidate({"eval/win_rate": 0.9}), None, asked(Verdict.TIMED_OUT, by=""))
    assert not decision.promoted
    assert decision.reason.startswith("no decision until 2026-11-24T09:30:15+00:00, which counts as a rejection;")


def test_approving_the_champion_moves_no_alias_and_rejecting_it_promotes_nothing() -> None:
    metrics = {"eval/score_mean": 0.5}
    kept = decide(candidate(metrics, "old"), champion(0.2), asked(Verdict.APPROVED))
    refused = decide(candidate(metrics, "old"), champion(0.2), asked(Verdict.REJECTED))
    assert (kept.promoted, kept.comparison) == (True, "same_model")
    assert (refused.promoted, refused.comparison) == (False, "person")


def test_approval_without_an_answer_is_an_error_that_says_what_to_clear() -> None:
    config = AUTO.model_copy(update={"promotion": Promotion.APPROVAL})
    with pytest.raises(ConfigError, match=r"promote\.approval is empty") as caught:
        decide(candidate({"eval/win_rate": 0.9}), None, config)
    assert "`approve`" in caught.value.advice


def without_judge(accuracy: float) -> Candidate:
    conditions = replace(CONDITIONS, reward_fingerprint="")
    return Candidate("new", {"eval/preference_accuracy": accuracy}, conditions)


def rated_champion(accuracy: float, **changed: str) -> Champion:
    """Measured with another judge, which has no part in accuracies on pairs."""
    return Champion("4", "old", {"eval/preference_accuracy": accuracy}, replace(CONDITIONS, **changed))


def test_without_a_judge_the_preference_accuracy_must_be_above_chance() -> None:
    wins, ties = decide(without_judge(0.51), None, AUTO), decide(without_judge(0.5), None, AUTO)
    assert (wins.promoted, ties.promoted) == (True, False)
    assert wins.comparison == ties.comparison == "preference_accuracy"
    assert wins.reason == (
        "no reward model has judged its answers; it prefers the chosen answer in 51.0% of the held-out pairs, "
        "above chance (50%); there is no champion yet"
    )


def test_without_a_judge_a_champion_on_the_same_pairs_must_be_beaten() -> None:
    better, worse = (
        decide(without_judge(0.7), rated_champion(0.6), AUTO),
        decide(without_judge(0.6), rated_champion(0.6), AUTO),
    )
    assert (better.promoted, worse.promoted) == (True, False)
    assert "not more than the champion (version 4) with 60.0%" in worse.reason
    elsewhere = decide(without_judge(0.6), rated_champion(0.9, data_digest="other"), AUTO)
    assert elsewhere.promoted
    assert "was not measured on these pairs" in elsewhere.reason


def test_without_a_judge_the_aligned_model_with_the_better_accuracy_is_chosen() -> None:
    measured = Evaluation({"ppo": {"eval/preference_accuracy": 0.6}, "dpo": {"eval/preference_accuracy": 0.7}})
    assert choose_aligned(["ppo", "dpo"], measured) == "dpo"
