"""Where a run enters and ends, what it reads, and which wishes contradict each other."""

from itertools import product
from typing import Any

import pytest

from stages.config.errors import ConfigError
from stages.config.graph import BASE_MODEL, GIVEN_MODELS, GRAPH, Alignment, Stage, pipeline_stages
from stages.config.pipeline import PipelineConfig
from stages.config.resolve import resolve
from stages.config.selection import Way, contradiction, first_stages, selected_stages, skipped_stages

GIVEN, GOLD = {"base_model": "/models/policy"}, {"gold_scorer": "train"}
CHATS, PAIRS, TEXT = {"instructions": ["/chats"]}, {"preferences": ["/pairs"]}, {"documents": ["/text"]}


def config(**values: Any) -> PipelineConfig:
    return resolve({"recipe": "tiny", **values})


def trained(**values: Any) -> set[str]:
    return {stage.value for stage in config(**values).selected if GRAPH[stage].trains}


def data_of(**values: Any) -> dict[str, tuple[str, ...]]:
    """The fields of data that curation reads."""
    curate = config(**values).curate
    read = {name: getattr(curate, name) for name in ("documents", "instructions", "preferences")}
    return {name: sources for name, sources in read.items() if sources}


@pytest.mark.parametrize(
    ("values", "stages"),
    [
        ({}, "pretrain sft reward ppo dpo"),
        ({"alignment": "dpo"}, "pretrain sft dpo"),
        ({"alignment": "dpo", "train_reward": True}, "pretrain sft reward dpo"),
        ({"alignment": "dpo", "reward_base": "/models/small"}, "pretrain sft reward dpo"),
        ({"alignment": "dpo", "reward_model": "/models/reward"}, "pretrain sft dpo"),
        ({"alignment": "ppo", "reward_model": "/models/reward"}, "pretrain sft ppo"),
        ({"alignment": "none"}, "pretrain sft"),
        ({"alignment": "none", "last_stage": "reward"}, "pretrain sft reward"),
        ({"last_stage": "dpo"}, "pretrain sft dpo"),
        ({"last_stage": "ppo"}, "pretrain sft reward ppo"),
        ({**GIVEN}, "sft reward ppo dpo"),
        ({**GIVEN, "continue_pretraining": True}, "pretrain sft reward ppo dpo"),
        ({**GIVEN, "first_stage": "sft"}, "sft reward ppo dpo"),
        ({**GIVEN, "first_stage": "reward"}, "reward ppo dpo"),
        ({**GIVEN, "first_stage": "reward", "alignment": "dpo"}, "reward dpo"),
        ({**GIVEN, "first_stage": "ppo", "reward_model": "/models/reward"}, "ppo dpo"),
        ({**GIVEN, "first_stage": "ppo", "reward_model": "/models/reward", "alignment": "ppo"}, "ppo"),
        ({**GIVEN, "first_stage": "dpo"}, "dpo"),
        ({**GIVEN, "first_stage": "evaluate", **CHATS}, ""),
        ({**GOLD}, "pretrain sft reward gold ppo dpo"),
        ({**GOLD, "alignment": "dpo"}, "pretrain sft gold dpo"),
        ({**GOLD, "last_stage": "ppo"}, "pretrain sft reward gold ppo"),  # its evaluations are judged
        ({**GOLD, "last_stage": "dpo"}, "pretrain sft dpo"),  # nothing is judged in it
        ({"gold_model": "/models/gold", "last_stage": "ppo"}, "pretrain sft reward ppo"),
        ({"last_stage": "gold"}, "pretrain sft gold"),
        ({"gold_model": "/models/gold"}, "pretrain sft reward ppo dpo"),
        ({**GIVEN, **GOLD, "first_stage": "dpo"}, "gold dpo"),
        ({**GIVEN, **GOLD, "first_stage": "evaluate", **CHATS}, ""),
        ({**GIVEN, "first_stage": "gold", "last_stage": "gold"}, "gold"),
    ],
    ids=str,
)
def test_a_run_trains_from_its_first_stage_on_and_nothing_that_it_is_given(values: dict[str, Any], stages: str) -> None:
    assert trained(**values) == set(stages.split())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"first_stage": "sft"}, "first_stage='sft' needs base_model, which is empty"),
        ({**GIVEN, "first_stage": "pretrain"}, "first_stage='pretrain' is not a stage that a run can enter at"),
        ({**GIVEN, "first_stage": "tokenize"}, "allowed: sft, reward, gold, ppo, dpo, evaluate, or empty"),
        ({**GIVEN, "first_stage": "sftt"}, "first_stage"),
        ({**GIVEN, "first_stage": "ppo"}, "first_stage='ppo' trains no reward model and ppo needs one"),
        ({**GIVEN, "first_stage": "ppo"}, "give reward_model, or use first_stage='reward'"),
        ({**GIVEN, "first_stage": "dpo", "alignment": "ppo"}, "is not part of a run with alignment='ppo'"),
        ({**GIVEN, "first_stage": "dpo", "train_reward": True}, "train_reward asks for a reward model"),
        ({**GIVEN, "first_stage": "dpo", "reward_base": "/models/small"}, "reward_base asks for a reward model"),
        ({**GIVEN, "first_stage": "dpo", "continue_pretraining": True}, "contradict each other, because pretraining"),
        ({**GIVEN, "first_stage": "sft", "continue_pretraining": True}, "contradict each other, because pretraining"),
        ({**GIVEN, "first_stage": "reward", "reward_model": "/r"}, "first_stage='reward' trains a reward model and"),
        ({"reward_model": "/r", "reward_base": "/b"}, "reward_model and reward_base contradict each other"),
        ({"reward_model": "/r", "train_reward": True}, "reward_model and train_reward contradict each other"),
        ({"reward_model": "/r", "last_stage": "reward"}, "last_stage='reward' trains a reward model and"),
        ({"reward_model": "/r", "last_stage": "sft"}, "reward_model is given and no stage of this run reads it"),
        ({"reward_base": "/b", "last_stage": "sft"}, "reward_base is given and no stage of this run reads it"),
        ({"train_reward": True, "last_stage": "sft"}, "train_reward=True and last_stage='sft'"),
        (
            {"reward_model": "/r", "gold_model": "/r/"},
            "gold_model='/r/' is reward_model too, and a scorer that a model",
        ),
        ({**GOLD, "gold_model": "/g"}, "gold_model and gold_scorer='train' contradict each other"),
        ({"gold_model": "/g", "last_stage": "gold"}, "last_stage='gold' trains a gold scorer and gold_model gives one"),
        ({"gold_model": "/g", "last_stage": "sft"}, "gold_model is given and no stage of this run reads it"),
        ({**GIVEN, "first_stage": "gold"}, "first_stage='gold' trains no reward model and ppo needs one"),
        ({"reward_model": "/models/reward.gguf"}, "is a GGUF file, which only base_model may be"),
        ({"continue_pretraining": True}, "continue_pretraining=True needs base_model"),
        ({**GIVEN, "first_stage": "dpo", "last_stage": "sft"}, r"last_stage='sft' is not part of a run .*first_stage"),
        ({"last_stage": "convert"}, r"last_stage='convert' is not part of a run .*no base_model is given"),
        ({**GIVEN, "first_stage": "evaluate"}, "are all empty: there is nothing to measure the model on"),
        ({**GIVEN, **CHATS, "first_stage": "evaluate", "last_stage": "promote"}, "nothing is trained that could be"),
        ({"overrides": {"curate.documents": []}}, "documents is empty, and pretrain has nothing to work on"),
        ({**GIVEN, "overrides": {"curate.instructions": []}}, "instructions is empty, and sft has nothing to work on"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_the_form_and_says_what_to_do(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**values)


def test_where_a_gold_scorer_is_trained_everything_else_learns_from_the_other_half_of_the_pairs() -> None:
    def halves(**values: Any) -> dict[Stage, str]:
        made = resolve({"recipe": "tiny", "seed": 3, **values})
        assert (made.reward.seed, made.gold.seed) == (3, 4)
        return {Stage.REWARD: made.reward.half, Stage.GOLD: made.gold.half, Stage.DPO: made.dpo.half}

    apart = {Stage.REWARD: "first", Stage.GOLD: "second", Stage.DPO: "first"}
    whole = {**apart, Stage.REWARD: "both", Stage.DPO: "both"}
    assert halves() == halves(gold_model="/models/gold") == whole
    # A run that ends before makes the very models that a longer one goes on with.
    assert halves(**GOLD) == halves(**GOLD, last_stage="reward") == apart
    assert halves(**GOLD, overrides={"dpo.half": "both"}) == {**apart, Stage.DPO: "both"}


def test_fingerprints_without_a_gold_scorer_are_those_from_before_there_were_halves() -> None:
    made, apart = resolve({"recipe": "tiny"}), resolve({"recipe": "tiny", **GOLD})
    for stage in (Stage.REWARD, Stage.DPO):
        assert "half" not in made.stage_config(stage).identity()
        assert apart.stage_config(stage).identity()["half"] == "first"
    assert made.gold.identity()["half"] == "second"


def test_ppo_reads_the_gold_scorer_of_a_run_that_has_one() -> None:
    def read(**values: Any) -> tuple[set[str], tuple[str, ...]]:
        made = resolve({"recipe": "tiny", **values})
        return set(made.stage_inputs(Stage.PPO)), made.given_roles(Stage.PPO)

    assert read() == ({"tokens", "model", "reward"}, ())
    assert read(**GOLD) == ({"tokens", "model", "reward", "gold"}, ())
    assert read(gold_model="/models/gold") == ({"tokens", "model", "reward"}, ("gold_model",))
    patient = {"overrides": {"ppo.gold_patience": 2, "ppo.eval_every": 2}}
    assert resolve({"recipe": "tiny", **GOLD, **patient}).ppo.gold_patience == 2
    assert resolve({"recipe": "tiny", "alignment": "dpo", **patient}).ppo.gold_patience == 2  # a run without PPO
    with pytest.raises(ConfigError, match=r"ppo\.gold_patience=2 needs a gold scorer, and this run has none"):
        resolve({"recipe": "tiny", **patient})
    assert "gold_patience" not in resolve({"recipe": "tiny"}).ppo.identity()


def test_a_recipe_asks_for_a_gold_scorer_only_where_pairs_are_read_anyway() -> None:
    def trained_by_demo(**values: Any) -> set[Stage]:
        return {stage for stage in resolve({"recipe": "demo", **values}).selected if GRAPH[stage].judges}

    assert trained_by_demo() == trained_by_demo(alignment="dpo") == {Stage.GOLD}
    assert trained_by_demo(alignment="none") == trained_by_demo(gold_scorer="none") == set()
    assert trained_by_demo(gold_model="/models/gold") == trained_by_demo(last_stage="sft") == set()
    assert trained_by_demo(**GIVEN, **PAIRS, first_stage="dpo") == set()  # a given model may be large
    assert trained_by_demo(**GIVEN, **TEXT, continue_pretraining=True, previous_data="/previous") == {Stage.GOLD}
    assert resolve({"recipe": "demo", "alignment": "none"}).gold_scorer == "none"


def test_a_way_without_contradictions_finds_every_input() -> None:
    """Over all wishes: each trained stage that runs has its inputs from the run, or from what the run is given."""
    checked = 0
    for alignment, last, first, given, further, reward, gold in product(
        Alignment,
        pipeline_stages(),
        (None, *first_stages()),
        (frozenset(), *map(frozenset, [{BASE_MODEL}, set(GIVEN_MODELS[:2]), {GIVEN_MODELS[0], GIVEN_MODELS[2]}])),
        (False, True),
        (False, True),
        (False, True),
    ):
        way = Way(alignment, last, first, given, further, reward, gold)
        if contradiction(way) or last not in selected_stages(way):
            continue
        checked += 1
        selected = selected_stages(way)
        for stage in selected:
            spec = GRAPH[stage]
            replaced = {place for role, place in spec.given if role in given}
            # What only judges, and what is made on demand, is there or not.
            learnt = [
                (role, source)
                for role, source in spec.inputs
                if not GRAPH[source].judges | bool(GRAPH[source].asked_by)
            ]
            missing = {role for role, source in learnt if source not in selected and role not in replaced}
            assert spec.closing or not missing, (way, stage, missing)
        assert selected | skipped_stages(way).keys() == set(pipeline_stages())
    assert checked > 300


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({**GIVEN, **CHATS, "last_stage": "sft"}, {"instructions": ("/chats",)}),
        ({**GIVEN, **PAIRS, "first_stage": "dpo"}, {"preferences": ("/pairs",)}),
        ({**GIVEN, **PAIRS, "first_stage": "reward", "last_stage": "reward"}, {"preferences": ("/pairs",)}),
        ({**GIVEN, **CHATS, "first_stage": "evaluate"}, {"instructions": ("/chats",)}),
        (
            {**GIVEN, **CHATS, "first_stage": "ppo", "alignment": "ppo", "reward_model": "/r"},
            {"instructions": ("/chats",)},
        ),
        # What a person names is read although no stage needs it.
        (
            {**GIVEN, **CHATS, **TEXT, "first_stage": "evaluate"},
            {"documents": ("/text",), "instructions": ("/chats",)},
        ),
        # Pairs that are derived are derived from documents.
        ({**GIVEN, "last_stage": "sft"}, {"documents": ("installed-docs",), "instructions": ("derived",)}),
        # A run that ends with its data makes what a run to the end goes on with.
        (
            {**GIVEN, **CHATS, "alignment": "none", "last_stage": "tokenize"},
            {"instructions": ("/chats",)},
        ),
        # Without a base model a shorter run makes the data of a longer one.
        (
            {"last_stage": "pretrain"},
            {"documents": ("installed-docs",), "instructions": ("derived",), "preferences": ("derived",)},
        ),
    ],
    ids=str,
)
def test_a_run_on_a_given_model_reads_what_its_stages_need_and_what_is_named(
    values: dict[str, Any], read: dict[str, tuple[str, ...]]
) -> None:
    assert data_of(**values) == read


def test_given_models_reach_the_stages_that_read_them() -> None:
    run = config(**GIVEN, **CHATS, reward_model="/models/reward", first_stage="ppo", alignment="ppo")
    roles = {stage: run.given_roles(stage) for stage in run.selected if run.given_roles(stage)}
    assert roles == {
        Stage.TOKENIZE: ("base_model",),
        Stage.PPO: ("base_model", "reward_model"),
        Stage.EVALUATE: ("base_model", "reward_model"),
    }
    smaller = config(**GIVEN, **CHATS, **PAIRS, reward_base="/models/small")
    assert smaller.given_roles(Stage.REWARD) == ("reward_base",)
    assert smaller.stage_inputs(Stage.REWARD) == {"tokens": Stage.TOKENIZE}
    assert smaller.stage_inputs(Stage.PPO) == {"tokens": Stage.TOKENIZE, "model": Stage.SFT, "reward": Stage.REWARD}
    assert [source.uri for source in smaller.stage_sources(Stage.REWARD)] == ["/models/small"]
    # Of two that could stand for one input, the one that was named for it counts.
    alone = config(**GIVEN, **PAIRS, reward_base="/models/small", first_stage="reward", last_stage="reward")
    assert alone.given_roles(Stage.REWARD) == ("reward_base",)


def test_what_is_converted_is_read_as_an_artifact_of_the_run() -> None:
    run = config(base_model="/models/policy.GGUF", **CHATS, alignment="none")
    assert [source.uri for source in run.stage_sources(Stage.CONVERT)] == ["/models/policy.GGUF"]
    for stage in (Stage.TOKENIZE, Stage.SFT, Stage.EVALUATE):
        assert run.stage_inputs(stage)["base_model"] is Stage.CONVERT
        assert run.stage_sources(stage) == ()
    # Where the file lies is no setting of what is made from its content.
    assert run.tokenize.base_model == run.with_given({}).tokenize.base_model == ""
    further = config(base_model="/models/policy.gguf", continue_pretraining=True)
    assert "base_model" in further.stage_inputs(Stage.PRETRAIN)
    assert "base_model" not in further.stage_inputs(Stage.SFT)
    assert "base_model" not in further.stage_inputs(Stage.EVALUATE)
    assert Stage.CONVERT not in config(base_model="/models/policy.gguf", last_stage="curate").selected
