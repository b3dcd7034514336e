"""What a pair counts and by how much its chosen answer is better, on the way from the tokens to the loss."""

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import tokenize
from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.preferences import RewardConfig
from stages.config.request import ArtifactRef
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.halves import prompt_digest
from stages.data.tokens.views import Split, TokensArtifact
from stages.train.comparisons import MARGIN, planned_comparisons, prompt_weights, side_by_side
from stages.train.pairs import WEIGHT, of_pairs
from tests.numerics.training import run_training
from tests.small_world import CONFIGS, make_context, make_models, published, write_curated

REWARD: Any = CONFIGS[Stage.REWARD]


def rate(folder: Path) -> None:
    """Give every other pair of a curated folder a margin."""
    for split in Split:
        path = folder / "preferences" / f"{split}.jsonl.gz"
        with gzip.open(path, "rt") as file:
            rows = [json.loads(line) for line in file]
        for number, row in enumerate(rows):
            row |= {"margin": 1.0 + number} if number % 2 else {}
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArtifactRef]:
    home = tmp_path_factory.mktemp("rated")
    curate = make_context(home, Stage.CURATE, CurateConfig())
    rate(write_curated(curate.output_dir))
    config = TokenizeConfig(vocab_size=300, sequence_length=64, max_prompt_length=32, bpe_train_bytes=10_000)
    context = make_context(home, Stage.TOKENIZE, config, {"curated": published(curate)})
    tokenize.run(context)
    return make_models(home, published(context))[Stage.REWARD]


@pytest.fixture(scope="module")
def tokens(inputs: dict[str, ArtifactRef], tmp_path_factory: pytest.TempPathFactory) -> TokensArtifact:
    context = make_context(tmp_path_factory.mktemp("reward"), Stage.REWARD, REWARD, inputs)
    return TokensArtifact(context.input_dir("tokens"))


def config(**changes: Any) -> RewardConfig:
    return REWARD.model_copy(update=changes)


def test_the_pairs_of_a_prompt_share_a_weight_of_one() -> None:
    # Rankings of 4 and of 3 responses, and a pair: 6, 3 and 1 pairs; pair 10 is of the other half.
    prompts = dict(enumerate([b"four"] * 6 + [b"three"] * 3 + [b"two"]))
    weights = prompt_weights(prompts, 11)
    assert weights.tolist() == pytest.approx([1 / 6] * 6 + [1 / 3] * 3 + [1.0] + [0.0])
    assert weights[:10].sum() == pytest.approx(3.0)


def test_pairs_of_a_prompt_come_in_a_row_in_every_pass() -> None:
    prompts = {0: b"x", 1: b"y", 2: b"x", 3: b"z", 4: b"y"}
    order = np.array([1, 0, 3, 4, 2, 2, 3, 1, 4, 0])  # two passes
    assert side_by_side(order, prompts).tolist() == [1, 4, 0, 2, 3, 2, 0, 3, 1, 4]


def test_in_the_batches_of_an_epoch_every_prompt_counts_once(tokens: TokensArtifact) -> None:
    planned = planned_comparisons(tokens, config(counted="prompt", num_epochs=2), micro_batch_size=2).planned
    pairs = tokens.pairs(Split.TRAIN)
    prompts = Counter(prompt_digest(pairs[index]) for index in range(len(pairs)))
    assert max(prompts.values()) > 2  # else the weights are all 1
    total = 0.0
    for start in range(0, len(planned.order), 10):
        for batch in planned.steps.micro_batches(planned.steps.pairs, planned.order[start : start + 10]):
            weights = of_pairs(batch, WEIGHT)
            assert weights is not None
            total += float(weights.sum())
    assert total == pytest.approx(2 * len(prompts), abs=1e-4)
    assert planned.ledger["prompts"] == len(prompts)
    assert sorted(planned.order.tolist()) == sorted([*range(len(pairs))] * 2)


def test_margins_travel_with_their_pairs_and_held_out_pairs_have_theirs(tokens: TokensArtifact) -> None:
    found = planned_comparisons(tokens, config(margin=0.5), micro_batch_size=4)
    steps = found.planned.steps
    for pairs, indices in ((steps.pairs, [7, 2, 3]), (found.heldout, [1, 0])):
        (batch,) = steps.micro_batches(pairs, np.array(indices))
        margins = of_pairs(batch, MARGIN)
        assert margins is not None
        assert margins.tolist() == [0.5 * (1 + index) * (index % 2) for index in indices]
        assert of_pairs(batch, WEIGHT) is None
    assert found.planned.ledger["pairs_with_margin"] == 30


def test_without_margins_in_the_data_asking_for_them_is_an_error(tokens: TokensArtifact, tmp_path: Path) -> None:
    assert planned_comparisons(tokens, config(), micro_batch_size=4).planned.steps.pairs is not None
    for split in Split:
        (tokens.folder / "preferences" / split / "margins.npy").rename(tmp_path / split)
    try:
        with pytest.raises(DataError, match="no training pair has a margin"):
            planned_comparisons(tokens, config(margin=1.0), micro_batch_size=4)
    finally:
        for split in Split:
            (tmp_path / split).rename(tokens.folder / "preferences" / split / "margins.npy")


def test_the_cut_into_micro_batches_does_not_matter_and_the_start_is_what_margins_ask_for(
    inputs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    changed = config(counted="prompt", margin=0.1, label_smoothing=0.1)
    whole, single = (
        run_training(tmp_path / str(rows), Stage.REWARD, changed, inputs, micro_batch_size=rows) for rows in (8, 1)
    )
    losses = [[row["train/loss"] for row in trained.history] for trained in (whole, single)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    first = whole.history[0]
    # Scores are 0 at the start, so the loss is that of the margins alone, above ln 2: what the gate compares with.
    assert first["train/loss"] == pytest.approx(first["reward/even_loss"], abs=1e-6)
    assert first["train/loss"] > math.log(2) + 0.01
