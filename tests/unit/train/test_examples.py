"""Labelled examples of KTO: where they come from, and the baseline that a step shares."""

import numpy as np
import pytest

from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.preference_losses import KTOLoss
from stages.config.preferences import DPOConfig, PairsHalf
from stages.data.tokens.packing import TokenSequence
from stages.data.tokens.views import Labelled, Pair, Sources
from stages.train.examples import DESIRABLE, Examples, _next_of_another, planned_examples
from tests.small_world import CONFIGS


def answered(prompt: list[int], answer: list[int]) -> TokenSequence:
    return TokenSequence(np.array(prompt + answer), np.array([0] * len(prompt) + [1] * len(answer)))


class Side(list[TokenSequence]):
    @property
    def num_targets(self) -> np.ndarray:
        return np.array([int(one.loss_mask.sum()) for one in self], dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(one.ids) for one in self], dtype=np.int64)


class Pairs:
    """Pairs in memory, as the view of a tokens folder gives them."""

    def __init__(self, *pairs: Pair) -> None:
        self.chosen, self.rejected = Side(pair.chosen for pair in pairs), Side(pair.rejected for pair in pairs)

    def __len__(self) -> int:
        return len(self.chosen)


class Alone(list[Labelled]):
    @property
    def num_targets(self) -> np.ndarray:
        return np.array([int(one.sequence.loss_mask.sum()) for one in self], dtype=np.int64)


A, B, C = [1, 2], [3, 4, 5], [6]
"""Prompts."""


class Tokens:
    sequence_length = 6

    def __init__(self, pairs: Pairs, alone: Alone) -> None:
        self._pairs, self._alone = pairs, alone

    def pairs(self, split: object) -> Pairs:
        return self._pairs

    def unpaired(self, split: object) -> Alone:
        return self._alone

    def pair_sources(self, split: object) -> Sources:
        return Sources(("pairs",) if len(self._pairs) else (), np.zeros(len(self._pairs), dtype=np.int32))

    def unpaired_sources(self, split: object) -> Sources:
        names = ("thumbs",) if self._alone else ()
        return Sources(names, np.zeros(len(self._alone), dtype=np.int32))


TWO_PAIRS = Pairs(
    Pair(answered(A, [10, 11]), answered(A, [12])),
    Pair(answered(B, [13]), answered(B, [14, 15])),
)
ONE_ALONE = Alone([Labelled(answered(C, [16, 17, 18]), is_desirable=False)])
CONFIG = CONFIGS[Stage.DPO].model_copy(update={"loss": KTOLoss()})
assert isinstance(CONFIG, DPOConfig)


def test_both_sides_of_pairs_and_single_responses_are_examples_with_their_labels() -> None:
    examples = Examples(TWO_PAIRS, ONE_ALONE, max_length=6)  # type: ignore[arg-type]
    assert len(examples) == 5
    assert [examples.labelled(index).is_desirable for index in range(5)] == [True, True, False, False, False]
    assert [int(examples.labelled(index).sequence.ids[-1]) for index in range(5)] == [11, 13, 12, 15, 18]
    assert examples.match(np.arange(5)) == 3
    labels = [examples[index].chosen.fields[DESIRABLE].tolist() for index in (0, 4)]
    assert labels == [[1.0] * 4, [0.0] * 4]


def test_a_mismatch_is_a_prompt_with_the_response_to_the_next_other_prompt_cut_to_fit() -> None:
    examples = Examples(TWO_PAIRS, ONE_ALONE, max_length=6)  # type: ignore[arg-type]
    examples.match(np.arange(5))
    assert examples[0].rejected.ids.tolist() == [*A, 13]  # the second pair's chosen answer
    assert examples[3].rejected.ids.tolist() == [*B, 16, 17, 18]
    assert examples[3].rejected.loss_mask.tolist() == [0, 0, 0, 1, 1, 1]
    assert examples[4].rejected.ids.tolist() == [*C, 10, 11]  # around the end
    short = Examples(TWO_PAIRS, ONE_ALONE, max_length=5)  # type: ignore[arg-type]
    short.match(np.arange(5))
    assert short[3].rejected.ids.tolist() == [*B, 16, 17]


def test_mismatches_stay_among_the_examples_that_are_used() -> None:
    examples = Examples(TWO_PAIRS, ONE_ALONE, max_length=6)  # type: ignore[arg-type]
    assert examples.match(np.array([0, 2, 4])) == 2
    assert examples[0].rejected.ids.tolist() == [*A, 16, 17, 18]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("abc", [1, 2, 0]),
        ("aabb", [2, 2, 0, 0]),
        ("aba", [1, 2, 1]),  # the last one's next is of its own prompt, around the end, so the one after that
        ("abbbb", [1, 0, 0, 0, 0]),
        ("aaa", [0, 1, 2]),
        ("a", [0]),
    ],
)
def test_the_next_of_another_prompt_is_found_around_the_end(prompts: str, expected: list[int]) -> None:
    assert _next_of_another([letter.encode() for letter in prompts]).tolist() == expected


def test_the_account_says_how_many_of_each_kind_are_trained() -> None:
    planned = planned_examples(Tokens(TWO_PAIRS, ONE_ALONE), CONFIG)  # type: ignore[arg-type]
    assert sorted(planned.order.tolist()) == [0, 1, 2, 3, 4]
    ledger = planned.ledger
    assert (ledger["pairs"], ledger["unpaired"], ledger["examples_trained"]) == (2, 1, 5)
    assert (ledger["desirable"], ledger["undesirable"]) == (2, 3)
    # of the pairs alone, as tokenize counts them
    assert (ledger["tokens_available"], ledger["targets_available"]) == (4 + 3 + 4 + 5, 2 + 1 + 1 + 2)
    shares = {name: share["examples"] for name, share in ledger["mixture"]["sources"].items()}
    assert shares == {"pairs": 4, "thumbs": 1}


def test_single_responses_alone_are_enough_and_one_prompt_is_not() -> None:
    several = Alone([*ONE_ALONE, Labelled(answered(A, [10]), is_desirable=True)])
    assert len(planned_examples(Tokens(Pairs(), several), CONFIG).order) == 2  # type: ignore[arg-type]
    with pytest.raises(DataError, match="responses to another prompt, with which KTO compares") as caught:
        planned_examples(Tokens(Pairs(Pair(TWO_PAIRS.chosen[0], TWO_PAIRS.rejected[0])), Alone()), CONFIG)  # type: ignore[arg-type]
    assert "at least two prompts" in caught.value.advice
    with pytest.raises(DataError, match="there are no training preferences"):
        planned_examples(Tokens(Pairs(), Alone()), CONFIG)  # type: ignore[arg-type]


def test_both_sides_of_a_pair_are_in_the_half_of_its_prompt() -> None:
    many = Pairs(*(Pair(answered([number, 2], [10, 11]), answered([number, 2], [12])) for number in range(40)))
    halves = {}
    for half in (PairsHalf.FIRST, PairsHalf.SECOND):
        planned = planned_examples(Tokens(many, Alone()), CONFIG.model_copy(update={"half": half}))  # type: ignore[arg-type]
        halves[half] = set(planned.order.tolist())
        assert {index % 40 for index in halves[half] if index < 40} == {
            index - 40 for index in halves[half] if index >= 40
        }
    assert halves[PairsHalf.FIRST] | halves[PairsHalf.SECOND] == set(range(80))
    assert not halves[PairsHalf.FIRST] & halves[PairsHalf.SECOND]
