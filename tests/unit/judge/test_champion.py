"""A champion that another run made: measured on the same items, whatever tokenizer it has, and never in the way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.config.request import ArtifactRef
from stages.config.tokens import PLAIN, TokenizeConfig
from stages.data.tokens.views import TokensArtifact
from stages.judge.bench import open_bench
from stages.judge.scores import ScoreTable
from tests.judging import SMALL, World, evaluated, evaluation, make_world, published_copy

OTHER = TokenizeConfig(
    vocab_size=340, sequence_length=96, max_prompt_length=48, bpe_train_bytes=10_000, chat_template=PLAIN
)
FOR_ALL = ("language", "responses", "pairs", "score", "repetition", "length")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """A model of another run, with a tokenizer and a chat template of its own."""
    return make_world(tmp_path_factory.mktemp("earlier"), OTHER).inputs["dpo"]


@pytest.fixture(scope="module")
def with_stranger(world: World, stranger: ArtifactRef) -> tuple[dict[str, Any], Path]:
    named = SMALL.model_copy(update={"champion": "models:/athanor-aligned/3"})
    report, _ = evaluated(world, named, champion=stranger)
    return report, evaluation(world, named, champion=stranger).output_dir


def test_a_champion_with_another_tokenizer_is_measured_on_the_same_items(
    with_stranger: tuple[dict[str, Any], Path],
) -> None:
    report, folder = with_stranger
    assert "texts_missing" not in report["data"]
    table = ScoreTable(folder / "scores.parquet")
    for suite in FOR_ALL:
        ours, theirs = (table.column(suite, role) for role in ("dpo", "champion"))
        assert len(ours.items), suite
        assert ours.items.tolist() == theirs.items.tolist(), suite
        assert ours.clusters.tolist() == theirs.clusters.tolist(), suite
        assert report["suites"][suite]["roles"]["champion"]["skipped"] == {}, suite


def test_a_champion_reads_the_texts_in_its_own_tokens(world: World, stranger: ArtifactRef) -> None:
    bench = open_bench(evaluation(world, champion=stranger))
    champion = bench.subjects.open("champion")
    for reply in bench.heldout.conversations:
        read = bench.heldout.sequence(reply, champion)
        said = champion.tokenizer.backend.decode(read.ids[read.loss_mask == 1].tolist())
        assert reply.chat is not None
        assert said.strip() == reply.chat.messages[-1]["content"]
        assert read.ids.tolist() != reply.tokens.ids.tolist()


def test_what_only_the_runs_tokens_can_tell_is_not_said_of_it(with_stranger: tuple[dict[str, Any], Path]) -> None:
    report, _ = with_stranger
    assert (
        not {"eval/perplexity", "eval/loss", "eval/response_loss", "eval/response_length"}
        & report["models"]["champion"].keys()
    )
    assert "champion" not in report["suites"]["kl"]["roles"]
    assert "champion" not in report["suites"]["preferences"]["roles"]


def test_every_aligned_model_is_compared_with_the_champion_and_with_its_start(
    with_stranger: tuple[dict[str, Any], Path],
) -> None:
    report, _ = with_stranger
    found = {(one["role"], one["against"], one["suite"]) for one in report["comparisons"]}
    directed = {suite for suite in FOR_ALL if suite != "length"}  # no length is better than another
    assert found == {("dpo", against, suite) for against in ("champion", "sft") for suite in directed}
    for one in report["comparisons"]:
        theirs = report["suites"][one["suite"]]["roles"][one["against"]]
        ours = report["suites"][one["suite"]]["roles"][one["role"]]
        assert one["difference"] == pytest.approx(ours["value"] - theirs["value"], abs=1e-12)
        assert one["items"] == ours["items"]


def test_the_report_says_which_version_the_champion_is(
    with_stranger: tuple[dict[str, Any], Path], stranger: ArtifactRef
) -> None:
    report, _ = with_stranger
    assert report["champion"] == {
        "name": "athanor-aligned",
        "version": "3",
        "fingerprint": stranger.fingerprint,
        "digest": stranger.digest,
        "uri": stranger.uri,
    }


def test_the_text_of_an_item_gives_what_its_ids_give(world: World, tmp_path: Path) -> None:
    """The same weights once as a model of the run, and once with a template that is spelled another way: read from the
    texts, everything comes out the same. Of `score` that is not so: a sampled answer need not be cut into tokens as its
    text is, so the reward model may read other ids."""
    template = TokensArtifact(Path(world.inputs["tokens"].uri.removeprefix("file://"))).tokenizer_dir
    spelled = "{# the same #}" + (template / "chat_template.jinja").read_text(encoding="utf-8")
    other = published_copy(tmp_path, world.inputs["sft"], chat_template__jinja=spelled)
    fresh = World(tmp_path, world.inputs)
    evaluated(fresh)
    report, outcome = evaluated(fresh, champion=other)
    # Six suites and two that show answers: what the SFT model got is not taken for what this one gets.
    assert outcome.ledger["units"]["measured"] == 8
    assert "eval/perplexity" not in report["models"]["champion"], "it was taken for a model with the run's tokenizer"
    for suite in (name for name in FOR_ALL if name != "score"):
        ours, theirs = (report["suites"][suite]["roles"][role] for role in ("sft", "champion"))
        assert theirs.pop("skipped") == ours.pop("skipped") == {}
        assert theirs == pytest.approx(ours, abs=1e-5), suite


def test_a_champion_with_the_runs_tokenizer_reads_its_ids(world: World, tmp_path: Path) -> None:
    report, outcome = evaluated(world, champion=published_copy(tmp_path, world.inputs["sft"]))
    assert report["models"]["champion"]["eval/perplexity"] == report["models"]["sft"]["eval/perplexity"]
    assert outcome.metrics["champion/suite/pairs/accuracy"] == outcome.metrics["sft/suite/pairs/accuracy"]


def test_a_champion_with_the_runs_tokenizer_and_fewer_positions_is_measured_on_what_it_can_read(
    world: World, tmp_path: Path
) -> None:
    """Rows have 64 tokens. What fits is compared; the perplexity of some of the rows would compare with nothing."""
    start = Path(world.inputs["sft"].uri.removeprefix("file://"))
    config = json.loads((start / "config.json").read_text()) | {"max_position_embeddings": 56}
    short = published_copy(tmp_path, world.inputs["sft"], config__json=json.dumps(config))
    report, _ = evaluated(world, champion=short)
    assert "missing" not in report["champion"]
    assert report["suites"]["language"]["roles"]["champion"]["items"] == 5
    assert {one["suite"] for one in report["comparisons"] if one["against"] == "champion"} >= {"language", "pairs"}
    assert "eval/perplexity" not in report["models"]["champion"]


def test_a_champion_that_is_gone_costs_nothing_but_the_comparison(world: World, tmp_path: Path) -> None:
    gone = published_copy(tmp_path, world.inputs["sft"], note__json="{}")
    shutil.rmtree(gone.uri.removeprefix("file://"))
    report, _ = evaluated(world, champion=gone)
    assert "manifest.json" in report["champion"]["missing"]
    assert {one["against"] for one in report["comparisons"]} == {"sft"}
    assert report["models"].keys() == {"sft", "dpo"}


def test_a_champion_whose_weights_are_no_model_is_left_out_with_the_reason(world: World, tmp_path: Path) -> None:
    broken = published_copy(tmp_path, world.inputs["sft"], model__safetensors="no weights")
    report, _ = evaluated(world, champion=broken)
    assert "safetensors" in report["champion"]["missing"] or "make no" in report["champion"]["missing"]
    assert report["models"].keys() == {"sft", "dpo"}


def test_without_the_curated_texts_a_stranger_is_measured_on_documents_and_the_rest_is_counted(
    world: World, stranger: ArtifactRef
) -> None:
    textless = World(world.home, {role: ref for role, ref in world.inputs.items() if role != "curated"})
    report, _ = evaluated(textless, champion=stranger)
    assert report["suites"]["language"]["roles"]["champion"]["items"] == 5
    for suite in ("responses", "pairs", "score", "length"):
        result = report["suites"][suite]["roles"]["champion"]
        assert result == {"items": 0, "skipped": {"no_text_for_another_tokenizer": 6}}, suite
    assert "do not name the curated data" in report["data"]["texts_missing"]
