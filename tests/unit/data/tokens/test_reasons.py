"""Reasons of raters on their way from curated rows to what trains, and what they leave out."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import tokenize
from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.preference_losses import KTOLoss
from stages.config.preferences import PairsHalf
from stages.config.principles import Area
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.halves import half_of
from stages.data.tokens.reasons import FILE, bits_of, by_area, counts_of, names_any
from stages.data.tokens.views import Split, TokensArtifact
from stages.train.comparisons import planned_comparisons
from stages.train.examples import heldout_examples, planned_examples
from stages.train.pairs import planned_pairs
from tests.small_world import CONFIGS, make_context, make_tokens, published, write_curated

HELPFUL, HONEST, HARMLESS = Area
SAID = ("helpful", "", "harmless, no-insults\nA comment.", "helpful, harmless", "because I say so")
"""Reasons of the pairs, in turn; the next pair has the first one again."""
REWARD: Any = CONFIGS[Stage.REWARD]
DPO: Any = CONFIGS[Stage.DPO].model_copy(update={"loss": KTOLoss()})


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokensArtifact:
    home = tmp_path_factory.mktemp("reasoned")
    curate = make_context(home, Stage.CURATE, CurateConfig())
    folder = write_curated(curate.output_dir)
    for split in Split:
        path = folder / "preferences" / f"{split}.jsonl.gz"
        with gzip.open(path, "rt") as file:
            rows = [json.loads(line) for line in file]
        for number, row in enumerate(rows):
            row |= {"reason": said} if (said := SAID[number % len(SAID)]) else {}
            if number == 5:
                row["rejected"] = row["chosen"]  # dropped, which must not move the reasons of those behind it
        _rewrite(path, rows)
        kept = ("id", "prompt", "group", "origin")
        single = [{name: rows[0][name] for name in kept} | {"response": "It is.", "label": True, "reason": "honest"}]
        single.append({**single[0], "id": "no-reason", "response": "It will.", "label": False, "reason": "so"})
        _rewrite(folder / "unpaired" / f"{split}.jsonl.gz", single)
    config = TokenizeConfig(vocab_size=300, sequence_length=64, max_prompt_length=32, bpe_train_bytes=10_000)
    context = make_context(home, Stage.TOKENIZE, config, {"curated": published(curate)})
    tokenize.run(context)
    return TokensArtifact(context.output_dir)


def said_of(num_rows: int) -> list[str]:
    return [SAID[number % len(SAID)] for number in range(num_rows) if number != 5]


def test_bits_are_counted_by_area_and_a_row_with_two_counts_in_both() -> None:
    bits = np.array([bits_of(areas) for areas in ((HELPFUL,), (), (HELPFUL, HARMLESS), (HARMLESS,))], dtype=np.uint8)
    assert counts_of(bits) == {"helpful": 2, "harmless": 2, "none": 1}
    assert names_any(bits, [HELPFUL]).tolist() == [True, False, True, False]
    assert names_any(bits, [HONEST, HARMLESS]).tolist() == [False, False, True, True]
    assert names_any(bits, []).all()
    assert by_area(bits)["none"].tolist() == [False, True, False, False]
    # What is stored must mean the same forever.
    assert [bits_of([area]) for area in (HELPFUL, HONEST, HARMLESS)] == [1, 2, 4]


def test_the_tokens_of_a_pair_keep_what_its_rater_said(tokens: TokensArtifact) -> None:
    for split, rows in (("train", 60), ("heldout", 15)):
        said = said_of(rows)
        bits = tokens.pair_reasons(Split(split))
        assert len(bits) == len(tokens.pairs(Split(split))) == rows - 1
        assert names_any(bits, [HELPFUL]).tolist() == ["helpful" in one for one in said]
        assert names_any(bits, [HARMLESS]).tolist() == ["harmless" in one for one in said]
        ledger = json.loads((tokens.folder / "ledger.json").read_text())[split]
        assert ledger["preferences"]["reasons"] == counts_of(bits)
        assert ledger["unpaired"]["reasons"] == {"honest": 1, "none": 1}


def test_without_a_reason_in_the_data_its_tokens_are_what_they_were(tmp_path: Path) -> None:
    plain = TokensArtifact(Path(make_tokens(tmp_path).uri.removeprefix("file://")))
    assert not list(plain.folder.rglob(FILE))
    assert "reasons" not in json.loads((plain.folder / "ledger.json").read_text())["train"]["preferences"]
    assert plain.pair_reasons(Split.TRAIN).tolist() == [0] * len(plain.pairs(Split.TRAIN))


@pytest.mark.parametrize("half", PairsHalf)
@pytest.mark.parametrize("reasons", [(HELPFUL,), (HARMLESS,), (HELPFUL, HARMLESS)])
def test_only_pairs_of_the_reasons_are_trained_and_held_out_and_every_other_is_counted(
    tokens: TokensArtifact, reasons: tuple[Area, ...], half: PairsHalf
) -> None:
    config = REWARD.model_copy(update={"reasons": reasons, "half": half})
    found = planned_comparisons(tokens, config, micro_batch_size=4)
    named = [any(area.value in said for area in reasons) for said in said_of(60)]
    pairs = tokens.pairs(Split.TRAIN)
    expected = [
        index for index, is_named in enumerate(named) if is_named and half in (PairsHalf.BOTH, half_of(pairs[index]))
    ]
    # By their numbers among all pairs, under which the reference's log-probabilities are kept.
    assert found.planned.steps.indices.tolist() == expected
    ledger = found.planned.ledger
    assert ledger["pairs_of_the_reasons"] == len(expected)
    lost = ledger["pairs_of_other_reasons"] + ledger.get("pairs_of_the_other_half", 0)
    assert ledger["pairs"] == len(pairs) == len(expected) + lost
    held = tokens.pairs(Split.HELDOUT)
    wanted = [index for index, said in enumerate(said_of(15)) if any(area.value in said for area in reasons)]
    assert len(found.heldout) == len(wanted)
    for place, index in enumerate(wanted):
        assert found.heldout[place].chosen.ids.tolist() == held[index].chosen.ids.tolist()


def test_of_no_reasons_every_pair_is_trained_and_the_ledger_is_what_it_was(tokens: TokensArtifact) -> None:
    planned = planned_pairs(tokens, REWARD, micro_batch_size=4)
    assert planned.steps.indices.tolist() == list(range(59))
    assert not [name for name in planned.ledger if "reasons" in name]
    assert len(planned_comparisons(tokens, REWARD, micro_batch_size=4).heldout) == 14


def test_both_sides_of_pairs_and_single_responses_of_the_reasons_are_examples(tokens: TokensArtifact) -> None:
    config = DPO.model_copy(update={"reasons": (HONEST, HELPFUL)})
    planned = planned_examples(tokens, config)
    helpful = [index for index, said in enumerate(said_of(60)) if "helpful" in said]
    assert sorted(planned.order.tolist()) == [*helpful, *(59 + index for index in helpful), 118]
    ledger = planned.ledger
    assert ledger["examples_of_the_reasons"] + ledger["examples_of_other_reasons"] == 2 * 59 + 2
    assert ledger["reasons"]["honest"] == 1
    examples, chosen = heldout_examples(tokens, config)
    wanted = [index for index, said in enumerate(said_of(15)) if "helpful" in said]
    assert chosen.tolist() == [*wanted, *(14 + index for index in wanted), 28]
    assert examples[int(chosen[-1])].chosen.ids.tolist() == tokens.unpaired(Split.HELDOUT)[0].sequence.ids.tolist()


@pytest.mark.parametrize("plan", [planned_examples, lambda *asked: planned_pairs(*asked, micro_batch_size=4)])
def test_reasons_that_nobody_gave_are_an_error_that_says_what_was_given(
    tokens: TokensArtifact, plan: Any, tmp_path: Path
) -> None:
    place = tokens.folder / "unpaired" / "train" / FILE
    place.rename(tmp_path / FILE)
    try:
        with pytest.raises(DataError) as caught:
            plan(tokens, DPO.model_copy(update={"reasons": (HONEST,)}))
    finally:
        (tmp_path / FILE).rename(place)
    assert caught.value.message.startswith("reasons=['honest']: none of the ")
    assert "they name helpful (" in caught.value.message
    assert "harmless (" in caught.value.message
