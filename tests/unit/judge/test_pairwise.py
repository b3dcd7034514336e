"""What two orders together say, how a written verdict is read, and how a judge's own agreement is counted."""

from collections.abc import Sequence

import pytest

from stages.judge.judges.pairwise_suite import is_better_than_chance
from stages.judge.pairwise import (
    UNCLEAR,
    Answer,
    Match,
    Preferred,
    Question,
    Verdict,
    agreement,
    first_place,
    read_verdict,
    verdicts,
)

FIRST, SECOND, NEITHER = Preferred.FIRST, Preferred.SECOND, Preferred.NEITHER


class Scripted:
    """A judge that says what it is told to, and remembers what it was asked."""

    identity = "scripted"

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.asked = list(answers), []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += questions
        return [self.answers.pop(0) for _ in questions]


@pytest.mark.parametrize(
    ("forward", "backward", "value"),
    [
        (FIRST, SECOND, 1.0),  # the response, wherever it stands
        (SECOND, FIRST, 0.0),
        (FIRST, FIRST, 0.5),  # the first place, whatever stands there
        (SECOND, SECOND, 0.5),
        (NEITHER, SECOND, 0.5),
        (FIRST, NEITHER, 0.5),
        (NEITHER, NEITHER, 0.5),
        (UNCLEAR, SECOND, None),
        (FIRST, UNCLEAR, None),
    ],
)
def test_only_what_both_orders_prefer_wins(forward: Answer, backward: Answer, value: float | None) -> None:
    judge = Scripted(forward, backward)
    (found,) = verdicts(judge, [Match("q", "mine", "theirs")])
    assert found.value == value
    assert found.reason == (UNCLEAR if value is None else "")
    assert judge.asked == [Question("q", "mine", "theirs"), Question("q", "theirs", "mine")]


def test_equal_responses_are_a_tie_that_is_not_asked_about_and_the_others_keep_their_answers() -> None:
    judge = Scripted(SECOND, FIRST, FIRST, SECOND)
    found = verdicts(judge, [Match("q", "x", "y"), Match("q", "same", "same"), Match("q", "z", "y")])
    assert [one.value for one in found] == [0.0, 0.5, 1.0]
    assert len(judge.asked) == 4
    assert verdicts(Scripted(), []) == []


def test_a_judge_without_a_sense_of_the_text_is_at_one_half_and_its_love_of_the_first_place_is_shown() -> None:
    blind = Scripted(*[FIRST, FIRST] * 10)
    found = verdicts(blind, [Match("q", f"chosen {number}", "rejected") for number in range(10)])
    known = agreement(found, [str(number) for number in range(10)])
    assert known is not None
    assert (known.accuracy, known.decided, known.accuracy_decided, known.first_place) == (0.5, 0.0, None, 1.0)


def test_agreement_counts_ties_as_one_half_and_leaves_out_what_was_not_judged() -> None:
    found = [Verdict(1.0)] * 6 + [Verdict(0.0)] * 2 + [Verdict(0.5)] * 2 + [Verdict(None, reason=UNCLEAR)] * 3
    known = agreement(found, [str(number) for number in range(13)])
    assert known is not None
    assert known.accuracy == pytest.approx((6 + 1) / 10)
    assert known.accuracy_decided == pytest.approx(6 / 8)
    assert (known.items, known.decided, known.skipped) == (10, 0.8, {UNCLEAR: 3})
    assert known.low < known.accuracy < known.high
    assert agreement([Verdict(None, reason=UNCLEAR)], ["a"]) is None


def test_pairs_of_one_prompt_count_as_one_for_the_interval() -> None:
    found = [Verdict(1.0), Verdict(0.0)] * 20
    apart = agreement(found, [str(number) for number in range(40)])
    together = agreement(sorted(found, key=lambda one: str(one.value)), [str(number // 10) for number in range(40)])
    assert apart is not None
    assert together is not None
    assert apart.accuracy == together.accuracy == 0.5
    assert together.high - together.low > 2 * (apart.high - apart.low)


@pytest.mark.parametrize(
    ("right", "wrong", "prompts", "proven"),
    [
        (1, 0, 1, False),
        (19, 0, 19, False),
        (20, 0, 20, True),
        (15, 5, 20, True),  # a coin gives 15 of 20 or more once in 48 times
        (14, 6, 20, False),  # and 14 once in 17
        (200, 0, 4, False),  # fifty pairs to each prompt
    ],
)
def test_a_judge_is_proven_by_what_a_coin_seldom_does(right: int, wrong: int, prompts: int, proven: bool) -> None:
    found = [Verdict(1.0)] * right + [Verdict(0.0)] * wrong
    known = agreement(found, [str(number % prompts) for number in range(right + wrong)])
    assert known is not None
    assert known.clusters == prompts
    assert is_better_than_chance(known) is proven


def test_preference_for_a_place_is_counted_over_orders() -> None:
    assert first_place([Verdict(1.0, placed_first=1, asked=2), Verdict(0.5, placed_first=2, asked=2)]) == 0.75
    assert first_place([Verdict(0.5)]) is None


@pytest.mark.parametrize(
    ("written", "preferred"),
    [
        ("A", FIRST),
        (" b.\n", SECOND),
        ("**B**", SECOND),
        ("TIE", NEITHER),
        ("Answer: A", FIRST),
        ("Answer B", SECOND),
        ("The better answer is B.", SECOND),
        ("First I thought [[A]], but the verdict is [[B]].", SECOND),
        ("[[C]]", NEITHER),
        ("<think>A is good. [[A]]</think>\nB", SECOND),
        ("A good question. Both are fine.", None),
        ("A or B", None),
        ("Both", None),
        ("AB", None),
        ("", None),
        ("<think>A", None),
    ],
)
def test_a_written_verdict_is_read_only_where_it_is_clear(written: str, preferred: Preferred | None) -> None:
    assert read_verdict(written) is preferred
