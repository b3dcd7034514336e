"""Synthesis in the form: what it adds to a run, which models it reads, and what about it cannot be."""

from typing import Any

import pytest

from stages.config.errors import ConfigError
from stages.config.gate_ledgers import synthetic
from stages.config.gate_records import Outcome
from stages.config.graph import Stage
from stages.config.request import SourceKind
from stages.config.resolve import resolve
from tests.gate_world import SYNTHETIC

GIVEN = {"recipe": "tiny", "base_model": "/models/x", "instructions": ["/i.jsonl"], "preferences": ["/p.jsonl"]}
ASKED = {**GIVEN, "synthesis": "self_instruct", "synthesis_sources": ["/seeds.jsonl"]}
AT_ENDPOINT = {"generator": "http://127.0.0.1:8000/v1", "overrides": {"synthesize.generator.model": "m"}}


def roles(**changes: Any) -> list[str]:
    """What the stage reads from outside."""
    return [source.role for source in resolve({**ASKED, **changes}).stage_sources(Stage.SYNTHESIZE)]


def test_without_it_nothing_changes() -> None:
    config = resolve(GIVEN)
    assert config.skipped[Stage.SYNTHESIZE] == "it is not asked for (synthesis)"
    assert config.stage_inputs(Stage.CURATE) == {}
    assert config.curate.instructions == ("/i.jsonl",)


def test_it_adds_a_stage_whose_data_is_curated_with_the_other_instructions() -> None:
    config = resolve(ASKED)
    assert config.stage_inputs(Stage.CURATE) == {"synthesize": Stage.SYNTHESIZE}
    assert config.curate.instructions == ("/i.jsonl", "synthesize")
    assert config.curate.preferences == ("/p.jsonl",)
    (rows, model) = config.stage_sources(Stage.SYNTHESIZE)
    assert (rows.role, rows.kind, rows.uri) == ("synthesis_sources", SourceKind.DATA, "/seeds.jsonl")
    assert (model.role, model.kind, model.uri) == ("base_model", SourceKind.MODEL, "/models/x")
    weighed = resolve({**ASKED, "instructions": ["/i.jsonl", "synthesize#weight=0.3"]})
    assert [(entry.source, entry.weight) for entry in weighed.sft.mixture] == [("synthesize", 0.3)]


def test_it_reads_the_generator_alone_and_the_reward_model_only_to_choose_by() -> None:
    assert roles() == ["synthesis_sources", "base_model"]
    assert roles(generator="/models/g") == ["synthesis_sources", "generator"]
    assert roles(**AT_ENDPOINT) == ["synthesis_sources"]
    assert roles(reward_model="/models/r") == ["synthesis_sources", "base_model"]
    chosen = {"reward_model": "/models/r", "overrides": {"synthesize.scorer.kind": "reward_model"}}
    assert roles(**chosen) == ["synthesis_sources", "base_model", "reward_model"]


def test_an_endpoint_suffices_for_a_run_from_scratch() -> None:
    config = resolve({"recipe": "tiny", "synthesis": "grounded", "synthesis_sources": ["/docs"], **AT_ENDPOINT})
    assert Stage.SYNTHESIZE in config.selected
    assert Stage.PRETRAIN in config.selected
    assert config.synthesize.generator.endpoint == "http://127.0.0.1:8000/v1"
    assert config.given_models == {}


def test_speed_and_prices_apart_from_the_budget_are_no_part_of_the_identity() -> None:
    def identity(**overrides: Any) -> dict[str, Any]:
        changes = {"synthesize.generator.model": "m", **overrides}
        return resolve({**ASKED, **AT_ENDPOINT, "overrides": changes}).synthesize.identity()

    assert identity() == identity(**{"synthesize.generator.concurrency": 32, "synthesize.generator.max_retries": 1})
    assert identity() != identity(**{"synthesize.generator.budget_tokens": 9000})
    assert identity() != identity(**{"synthesize.max_similarity": 0.6})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_model": ""}, "synthesis needs a model that writes, and generator and base_model are empty"),
        ({"synthesis_sources": []}, "synthesis='self_instruct' starts from rows, and synthesis_sources is empty"),
        ({"synthesis": "off"}, r"synthesis_sources=.* is given and synthesis is off"),
        ({"synthesis": "off", "synthesis_sources": [], "generator": "/g"}, "generator is given and synthesis is off"),
        ({"first_stage": "dpo", "alignment": "dpo"}, "makes instructions, and no stage of this run reads"),
        ({"generator": "https://llm.example/v1"}, "model is empty"),
        (
            {"generator": "https://llm.example/v1", "overrides": {"synthesize.generator.model": "m"}},
            r"generator='https://llm\.example/v1' is not an endpoint that may be asked",
        ),
        ({"synthesis_sources": ["/etc/passwd"]}, "synthesis_sources='/etc/passwd' leads to"),
        ({"overrides": {"synthesize.scorer.kind": "reward_model"}}, "needs a given reward_model"),
        ({"overrides": {"synthesize.method": "off"}}, "cannot be set"),
        ({"overrides": {"synthesize.generator.endpoint": "http://127.0.0.1"}}, "cannot be set"),
        ({"overrides": {"execution.synthesize.num_workers": 2}}, "execution.synthesize.num_workers=2"),
        ({"synthesis": "off", "synthesis_sources": [], "instructions": ["synthesize"]}, "synthesis='off' makes no"),
    ],
)
def test_what_cannot_be_is_refused_with_the_field(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve({**ASKED, **changes})


def test_the_gate_counts_again() -> None:
    class Made:
        ledger = SYNTHETIC

    assert {check.outcome for check in synthetic(Made())} == {Outcome.PASSED}  # type: ignore[arg-type]
    for step, name in (("rows", "kept"), ("inputs", "in"), ("published", "instructions")):
        Made.ledger = {**SYNTHETIC, step: {**SYNTHETIC[step], name: 5}}
        assert Outcome.FAILED in {check.outcome for check in synthetic(Made())}, step  # type: ignore[arg-type]
    Made.ledger = {name: value for name, value in SYNTHETIC.items() if name not in ("inputs", "instructions")}
    assert {check.outcome for check in synthetic(Made())} == {Outcome.PASSED}  # type: ignore[arg-type]
