"""Asked shares become the order of training exactly, whatever the sizes of the sources."""

from typing import Any

import numpy as np
import pytest

from stages.config.errors import DataError
from stages.config.sources import SourceWeight
from stages.config.train import OptimizerConfig, SFTConfig
from stages.data.tokens.views import Sources
from stages.train.mixture import Mixture, training_order
from stages.train.plan import epochs

NAMES = ("math", "chat", "code")
SIZES = (10, 200, 90)


def mixed(weights: dict[str, float], *, tokens: np.ndarray | None = None, **settings: Any) -> Mixture:
    indices = np.repeat(np.arange(3), SIZES)[np.random.default_rng(5).permutation(300)]
    config = SFTConfig(
        optimizer=OptimizerConfig(learning_rate=1e-3),
        global_batch_size=4,
        mixture=tuple(SourceWeight(source=name, weight=weight) for name, weight in weights.items()),
        **settings,
    )
    sources = Sources(NAMES, indices.astype(np.int32))
    return training_order(sources, np.full(300, 3) if tokens is None else tokens, config)


def test_without_weights_every_example_is_seen_as_often_as_epochs_say() -> None:
    mixture = mixed({}, num_epochs=2, seed=3)
    assert mixture.order.tolist() == epochs(300, num_epochs=2, seed=3).tolist()
    assert [share.examples for share in mixture.shares.values()] == [20, 400, 180]
    assert [share.asked for share in mixture.shares.values()] == [None, None, None]


def test_shares_are_realised_to_the_example() -> None:
    mixture = mixed({"math": 1, "chat": 2, "code": 1})
    assert len(mixture.order) == 300
    assert {name: share.examples for name, share in mixture.shares.items()} == {"math": 75, "chat": 150, "code": 75}
    assert [share.realised for share in mixture.shares.values()] == [0.25, 0.5, 0.25]
    assert [share.asked for share in mixture.shares.values()] == [0.25, 0.5, 0.25]
    assert mixture.shares["math"].epochs == 7.5
    assert mixture.shares["chat"].target_tokens == 450


def test_odd_examples_go_to_the_largest_remainders() -> None:
    mixture = mixed({"math": 1, "chat": 1, "code": 5})  # of 300: 42.86, 42.86, 214.29
    assert [share.examples for share in mixture.shares.values()] == [43, 43, 214]


def test_a_repeated_source_is_gone_through_before_it_repeats_and_a_cut_one_repeats_nothing() -> None:
    order = mixed({"math": 0.25, "chat": 0.5, "code": 0.25}).order
    counts = np.bincount(order, minlength=300)
    seen = sorted(counts[counts > 1].tolist())
    assert seen == [7] * 5 + [8] * 5  # 75 = 7.5 passes over 10 examples
    assert (counts > 0).sum() == 10 + 150 + 75


def test_every_part_of_training_has_the_mixture() -> None:
    mixture = mixed({"math": 0.1, "chat": 0.6, "code": 0.3}, num_epochs=3)
    indices = np.repeat(np.arange(3), SIZES)[np.random.default_rng(5).permutation(300)]
    origins = indices[mixture.order]
    steps = np.arange(1, len(origins) + 1)
    for place, share in enumerate((0.1, 0.6, 0.3)):
        assert np.abs(np.cumsum(origins == place) - share * steps).max() <= 2


def test_sources_without_a_weight_share_the_rest_by_size() -> None:
    mixture = mixed({"math": 0.71})
    assert mixture.shares["math"].examples == 213
    assert [mixture.shares[name].examples for name in ("chat", "code")] == [60, 27]  # 87 as 200 to 90


def test_shares_of_tokens_follow_the_tokens() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, size=300)
    mixture = mixed({"math": 0.5, "chat": 0.25, "code": 0.25}, tokens=tokens, mixture_unit="tokens")
    trained = tokens[mixture.order].sum()
    assert abs(trained - tokens.sum()) <= 3 * 50
    for share in mixture.shares.values():
        assert abs(share.target_tokens - share.asked * tokens.sum()) <= 25  # half of the longest example
        assert share.realised == share.target_tokens / trained


def test_a_limit_on_repetition_shortens_training_and_keeps_the_shares() -> None:
    mixture = mixed({"math": 0.5, "chat": 0.3, "code": 0.2}, max_source_epochs=4)
    assert {name: share.examples for name, share in mixture.shares.items()} == {"math": 40, "chat": 24, "code": 16}


def test_the_order_is_a_function_of_the_seed() -> None:
    weights = {"math": 0.5, "chat": 0.3, "code": 0.2}
    first, again, other = (mixed(weights, seed=seed).order.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_weights_that_the_data_cannot_have_are_refused() -> None:
    with pytest.raises(DataError, match=r"mixture names \['poems'\], of which there is no example"):
        mixed({"poems": 0.5})
    with pytest.raises(DataError, match=r"gives 1 of the training to \['chat', 'math'\].*nothing for \['code'\]"):
        mixed({"math": 0.5, "chat": 0.5})
