"""Which half of the training pairs a pair is in, and that what trains sees one half alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.preferences import PairsHalf, RewardConfig
from stages.config.train import OptimizerConfig
from stages.data.tokens import halves
from stages.data.tokens.halves import half_of, indices_of, some_sources
from stages.data.tokens.packing import TokenSequence
from stages.data.tokens.ragged import Ragged, RaggedWriter
from stages.data.tokens.views import Pair, PairView, SequenceView, Sources, Split, TokensArtifact
from stages.train.pairs import planned_pairs
from tests.small_world import make_context, make_tokens


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    def side(answer: list[int]) -> TokenSequence:
        return TokenSequence(np.array([*prompt, *answer]), np.array([0] * len(prompt) + [1] * len(answer)))

    return Pair(side(chosen), side(rejected))


def view(folder: Path, pairs: list[Pair], dtype: type) -> PairView:
    sides = []
    for name in ("chosen", "rejected"):
        writers = {part: RaggedWriter(folder / name, part, np.dtype(dtype)) for part in ("ids", "mask")}
        for one in pairs:
            sequence = getattr(one, name)
            writers["ids"].append(sequence.ids)
            writers["mask"].append(sequence.loss_mask)
        for writer in writers.values():
            writer.close()
        sides.append(SequenceView(*(Ragged(folder / name, part) for part in ("ids", "mask"))))
    return PairView(*sides)


def small(**values: Any) -> RewardConfig:
    return RewardConfig(optimizer=OptimizerConfig(learning_rate=1e-3), global_batch_size=4, **values)


@pytest.fixture
def tokens(tmp_path: Path) -> TokensArtifact:
    context = make_context(tmp_path, Stage.REWARD, small(), {"tokens": make_tokens(tmp_path)})
    return TokensArtifact(context.input_dir("tokens"))


def test_a_prompt_decides_the_half_of_all_its_pairs_whatever_the_answers_are() -> None:
    for number in range(50):
        prompt = [1, number, 7]
        halves = {
            half_of(pair(prompt, [3], [4])),
            half_of(pair(prompt, [9, 9, 9], [2])),
            half_of(pair(prompt, [5], [6, 6])),
        }
        assert len(halves) == 1
    # The answers' tokens are not part of the prompt: moved into it, they make another prompt.
    moved = [half_of(pair([1, number], [7, 3], [4])) is half_of(pair([1, number, 7], [3], [4])) for number in range(50)]
    assert 10 < sum(moved) < 40


def test_both_halves_together_are_all_pairs_and_about_as_large(tmp_path: Path) -> None:
    pairs = view(tmp_path, [pair([1, number // 256, number % 256], [3], [4]) for number in range(400)], np.uint16)
    first, second = indices_of(pairs, PairsHalf.FIRST), indices_of(pairs, PairsHalf.SECOND)
    assert sorted([*first, *second]) == list(indices_of(pairs, PairsHalf.BOTH)) == list(range(400))
    assert 160 < len(first) < 240  # four standard deviations


def test_the_half_of_a_pair_depends_on_nothing_but_its_prompt(tmp_path: Path) -> None:
    """Neither on other pairs nor on the width in which ids are stored."""
    many = [pair([1, number], [3], [4]) for number in range(60)]
    narrow, wide = view(tmp_path / "narrow", many, np.uint16), view(tmp_path / "wide", many[30:], np.uint32)
    assert [half_of(narrow[index]) for index in range(30, 60)] == [half_of(wide[index]) for index in range(30)]


def test_sources_of_a_half_are_those_that_it_has_pairs_of() -> None:
    sources = Sources(("a", "b", "c"), np.array([0, 1, 2, 2, 0], dtype=np.int32))
    some = some_sources(sources, np.array([2, 4, 3]))
    assert some.names == ("a", "c")
    assert some.indices.tolist() == [1, 0, 1]


def test_reward_and_gold_train_on_different_prompts_and_count_what_they_leave_out(tokens: TokensArtifact) -> None:
    whole = tokens.pairs(Split.TRAIN)
    prompts = [pair.chosen.ids[: int(np.flatnonzero(pair.chosen.loss_mask)[0])].tobytes() for pair in whole]
    seen: dict[PairsHalf, set[bytes]] = {}
    for half in PairsHalf:
        planned = planned_pairs(tokens, small(half=half), micro_batch_size=4)
        # Pairs keep their numbers: DPO keeps the reference's log-probabilities under them, for other runs too.
        trained = planned.steps.indices
        assert trained.tolist() == indices_of(whole, half).tolist()
        seen[half] = {prompts[index] for index in trained}
        left_out = planned.ledger.get("pairs_of_the_other_half", 0)
        assert planned.ledger["pairs"] == len(whole) == len(trained) + left_out
        assert planned.ledger["pairs_trained"] == len(trained)
    assert not seen[PairsHalf.FIRST] & seen[PairsHalf.SECOND]
    assert seen[PairsHalf.FIRST] | seen[PairsHalf.SECOND] == seen[PairsHalf.BOTH] == set(prompts)


def test_a_half_without_pairs_is_an_error_that_says_what_to_do(
    tokens: TokensArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = half_of(tokens.pairs(Split.TRAIN)[0])
    monkeypatch.setattr(halves, "half_of", lambda pair: only)  # as if all pairs had one prompt
    other = PairsHalf.SECOND if only is PairsHalf.FIRST else PairsHalf.FIRST
    with pytest.raises(DataError, match=f"training preference pairs in the {other} half .* in both"):
        planned_pairs(tokens, small(half=other), micro_batch_size=4)
