"""Right input becomes a frozen config, wrong input a sentence that names the field."""

from typing import Any

import pytest
from pydantic import ValidationError

from stages.config.errors import ConfigError
from stages.config.graph import GRAPH, Alignment, Stage, pipeline_stages
from stages.config.pipeline import PipelineConfig
from stages.config.recipes import RECIPES
from stages.config.request import SourceKind
from stages.config.resolve import resolve
from stages.config.selection import Way, selected_stages
from stages.config.suites import check_suites


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resolves(recipe: str) -> None:
    config = resolve({"recipe": recipe})
    assert config.recipe == recipe
    assert config.sft.seed == 0


def test_a_recipe_may_name_the_model_that_it_starts_from() -> None:
    config = resolve({"recipe": "smollm"})
    assert config.base_model == config.tokenize.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert Stage.PRETRAIN not in config.selected
    assert resolve({"recipe": "smollm", "base_model": ""}).base_model == config.base_model
    assert resolve({"recipe": "smollm", "base_model": "/models/x"}).base_model == "/models/x"
    assert resolve({"recipe": "smollm", "overrides": {"base_model": "/models/x"}}).base_model == "/models/x"
    assert Stage.PRETRAIN in resolve({"recipe": "smollm", "continue_pretraining": True}).selected
    with pytest.raises(ConfigError, match="last_stage='pretrain' is not part of a run"):
        resolve({"recipe": "smollm", "last_stage": "pretrain"})
    assert resolve({"recipe": "demo"}).base_model == ""


def test_the_form_reaches_its_fields() -> None:
    config = resolve(
        {
            "recipe": "tiny",
            "run_name": "mine",
            "documents": ["/data/text", "installed-docs"],
            "seed": 7,
            "promotion": "never",
            "base_model": "/models/x",
            "overrides": {"sft.optimizer.learning_rate": 0.5, "execution": {"sft": {"micro_batch_size": 2}}},
        }
    )
    assert config.curate.documents == ("/data/text", "installed-docs")
    assert config.promote.run_name == "mine"
    assert config.promote.promotion == "never"
    assert config.sft.seed == config.pretrain.seed == 7
    assert config.sft.optimizer.learning_rate == 0.5
    assert config.execution.sft.micro_batch_size == 2
    assert config.tokenize.base_model == "/models/x"
    (source,) = config.stage_sources(Stage.SFT)
    assert (source.role, source.kind, source.uri) == ("base_model", SourceKind.MODEL, "/models/x")


def test_a_stage_can_have_its_own_seed() -> None:
    config = resolve({"recipe": "tiny", "seed": 7, "overrides": {"curate.seed": 1}})
    assert (config.curate.seed, config.sft.seed) == (1, 7)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        resolve({"recipe": "tiny"}).sft.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message", "advice"),
    [
        ({"recipe": "dmo"}, r"recipe='dmo' does not exist; allowed: demo", "Did you mean 'demo'"),
        ({"alignment": "rlhf"}, r"alignment='rlhf'.*'ppo', 'dpo', 'both' or 'none'", "Correct"),
        ({"last_stage": "ppoo"}, r"last_stage='ppoo'", "Correct"),
        ({"alignment": "dpo", "last_stage": "ppo"}, r"last_stage='ppo' is not part of a run", "another"),
        ({"base_model": "/m", "last_stage": "pretrain"}, r"last_stage='pretrain' is not part", "another"),
        ({"seed": -1}, r"seed=-1", "Correct"),
        ({"run_name": "a b"}, r"run_name='a b' may hold letters", "Correct"),
        ({"sead": 3}, r"sead: unknown field. Did you mean 'seed'", "Correct"),
        (
            {"overrides": {"sft.optimizer.learning_rat": 1}},
            r"'sft.optimizer.learning_rat' does not exist",
            "Did you mean 'sft.optimizer.learning_rate'",
        ),
        ({"overrides": {"learning_rate": 1}}, r"'learning_rate' does not exist", "learning_rate'"),
        ({"overrides": {"sft": 3}}, r"'sft' is a group of fields", "sft.num_epochs"),
        ({"overrides": {"sft.optimizer.learning_rate": "fast"}}, r"sft.optimizer.learning_rate='fast'", "Correct"),
        (
            {"overrides": {"ppo.rollout_size": 100, "ppo.global_batch_size": 32}},
            r"rollout_size=100 is not divisible by global_batch_size=32; use 96 or 128",
            "Correct",
        ),
        (
            {"overrides": {"execution.sft.num_workers": 2, "execution.sft.min_workers": 3}},
            r"min_workers=3 is more than num_workers=2; use at most 2",
            "Correct",
        ),
        (
            {"overrides": {"execution.curate.num_workers": 2, "execution.curate.min_workers": 1}},
            r"min_workers=1 needs checkpoint_every >= 1, got 0",
            "Correct",
        ),
        ({"overrides": {"execution.sft.engine": "fsdp"}}, r"engine=fsdp needs num_workers >= 1", "Correct"),
        ({"overrides": {"execution.sft.engine": "deepspeed"}}, r"engine=deepspeed needs num_workers >= 1", "Correct"),
        (
            {"overrides": {"execution.sft.num_workers": 3, "execution.sft.tensor_parallel": 2}},
            r"num_workers=3 is not a multiple of tensor_parallel=2 x pipeline_parallel=1; use 4",
            "Correct",
        ),
        (
            {"overrides": {"execution.sft": {"engine": "deepspeed", "num_workers": 2, "tensor_parallel": 2}}},
            r"does not go with engine=deepspeed; use engine=fsdp",
            "Correct",
        ),
        (
            {"overrides": {"execution.sft": {"engine": "fsdp", "num_workers": 2, "offload": True}}},
            r"offload=true needs engine=deepspeed, got fsdp",
            "Correct",
        ),
        (
            {"overrides": {"execution.ppo": {"num_workers": 2, "pipeline_parallel": 2}}},
            r"ppo.pipeline_parallel=2: only pretrain and sft run through a pipeline; use tensor_parallel",
            "Correct",
        ),
        (
            {"overrides": {"execution.pretrain": {"num_workers": 2, "tensor_parallel": 2}}},
            r"execution.pretrain.tensor_parallel=2 does not divide pretrain.model.num_kv_heads=1",
            "divisor",
        ),
        ({"overrides": {"sft.precision": "fp16"}}, r"sft.precision='fp16' needs execution.sft.gpus_per_worker", "bf16"),
        (
            {
                "overrides": {
                    "sft.precision": "fp16",
                    "execution.sft": {"engine": "deepspeed", "num_workers": 1, "gpus_per_worker": 1},
                }
            },
            r"fp16' does not go with execution.sft.engine=deepspeed",
            "engine=fsdp",
        ),
        (
            {"overrides": {"sft.lora": {"rank": 8, "quantization": "nf4"}}},
            r"sft.lora.quantization=nf4 needs execution.sft.gpus_per_worker, got 0",
            "quantization=none",
        ),
        (
            {
                "overrides": {
                    "sft.lora": {"rank": 8, "quantization": "nf4"},
                    "execution.sft": {"engine": "fsdp", "num_workers": 1, "gpus_per_worker": 1},
                }
            },
            r"sft.lora.quantization=nf4 does not go with execution.sft.engine=fsdp",
            "engine=ddp",
        ),
        (
            {
                "overrides": {
                    "sft.lora": {"rank": 8, "target_parameters": ["all-experts"]},
                    "execution.sft.compile": True,
                }
            },
            r"execution.sft.compile=true does not go with sft.lora.target_parameters",
            "compile=false",
        ),
        (
            {
                "overrides": {
                    "pretrain.optimizer.algorithm": "muon",
                    "execution.pretrain": {"engine": "deepspeed", "num_workers": 1},
                }
            },
            r"pretrain.optimizer.algorithm=muon does not go with execution.pretrain.engine=deepspeed",
            "engine=fsdp",
        ),
        (
            {
                "overrides": {
                    "dpo.optimizer.algorithm": "muon",
                    "pretrain.model.num_kv_heads": 2,
                    "execution.dpo": {"num_workers": 2, "tensor_parallel": 2},
                }
            },
            r"dpo.optimizer.algorithm=muon needs whole matrices, which execution.dpo.tensor_parallel=2 cuts",
            "adamw",
        ),
        (
            {
                "overrides": {
                    "dpo.lora.rank": 4,
                    "pretrain.model.num_kv_heads": 2,
                    "execution.dpo": {"num_workers": 2, "tensor_parallel": 2},
                }
            },
            r"dpo.lora.rank=4 does not go with execution.dpo.tensor_parallel=2",
            "dpo.lora.rank=0",
        ),
        (
            {
                "overrides": {
                    "sft.neftune_alpha": 5.0,
                    "execution.sft": {"num_workers": 2, "pipeline_parallel": 2},
                }
            },
            r"sft.neftune_alpha=5.0 does not go with execution.sft.pipeline_parallel=2",
            "pipeline_parallel=1",
        ),
        (
            {
                "overrides": {
                    "pretrain.model.num_experts": 4,
                    "execution.pretrain": {"num_workers": 2, "pipeline_parallel": 2},
                }
            },
            r"pretrain.model.num_experts=4 does not go with execution.pretrain.pipeline_parallel=2",
            "pipeline_parallel=1",
        ),
        (
            {"overrides": {"execution.pretrain": {"num_workers": 4, "pipeline_parallel": 4}}},
            r"execution.pretrain.pipeline_parallel=4 is more than pretrain.model.num_layers=2",
            "at most 2",
        ),
        ({"overrides": {"pretrain.model.num_heads": 7}}, r"hidden_size=32 is not divisible by num_heads=7", "Correct"),
    ],
)
def test_wrong_input_names_the_field(values: dict, message: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve({"recipe": "tiny", **values})
    assert advice in caught.value.advice


def test_selected_stages_are_closed_over_their_needs() -> None:
    """Whatever is chosen, every selected stage finds the inputs that it cannot do without."""
    for alignment in Alignment:
        for last_stage in pipeline_stages():
            chosen = selected_stages(Way(alignment, last_stage))
            for stage in chosen & {Stage.SFT, Stage.REWARD, Stage.PPO, Stage.DPO}:
                # A gold scorer only measures, so PPO does without.
                needed = {source for _, source in GRAPH[stage].inputs if not GRAPH[source].judges}
                assert needed <= chosen, (alignment, last_stage, stage)


def test_each_alignment_selects_its_stages() -> None:
    def chosen(alignment: Alignment) -> set[Stage]:
        return set(selected_stages(Way(alignment, Stage.REPORT)))

    everything = set(pipeline_stages()) - {Stage.CONVERT, Stage.CONSTITUTION, Stage.SYNTHESIZE, Stage.GOLD}
    assert chosen(Alignment.BOTH) == everything
    assert chosen(Alignment.PPO) == everything - {Stage.DPO}
    assert chosen(Alignment.DPO) == everything - {Stage.PPO, Stage.REWARD}
    assert chosen(Alignment.NONE) == everything - {Stage.PPO, Stage.DPO, Stage.REWARD}


def test_every_field_is_documented() -> None:
    """The text under a field is its help everywhere."""
    from stages.config.base import Config
    from stages.config.help import field_help

    def undocumented(model: type[Config], path: str = "") -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
                missing += undocumented(field.annotation, f"{path}{name}.")
            elif not field_help(model)[name]:
                missing.append(f"{path}{name}")
        return missing

    from stages.config.forms import PipelineParams
    from stages.config.pipeline import CONFIG_CLASSES

    assert [name for model in (PipelineParams, *CONFIG_CLASSES.values()) for name in undocumented(model)] == []


def test_pairs_cannot_be_derived_from_other_documents() -> None:
    with pytest.raises(ConfigError, match=r"instructions='derived' needs 'installed-docs' among documents"):
        resolve({"recipe": "tiny", "documents": ["/data"]})
    assert resolve({"recipe": "tiny", "documents": ["/data"], "last_stage": "pretrain"})


def test_weights_behind_sources_go_to_the_stages_that_train_on_them() -> None:
    given = {"instructions": ["s3://b/math#weight=0.3&format=alpaca", "s3://b/chat"], "preferences": ["/p#weight=2"]}
    config, same = (
        resolve({"recipe": "tiny", **given, "instructions": lines})
        for lines in (given["instructions"], ["s3://b/math#format=alpaca", "s3://b/chat"])
    )
    assert config.curate.instructions == ("s3://b/math#format=alpaca", "s3://b/chat")
    assert list(config.curate.outside_sources)[1:] == ["s3://b/math", "s3://b/chat", "/p"]
    assert [(entry.source, entry.weight) for entry in config.sft.mixture] == [("s3://b/math", 0.3)]
    assert [entry.source for entry in config.dpo.mixture] == [entry.source for entry in config.reward.mixture] == ["/p"]
    assert config.curate == same.curate
    assert same.sft.mixture == ()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"instructions": ["/a#wieght=0.3"]}, "unknown option 'wieght'; did you mean 'weight'"),
        ({"instructions": ["/a#weight=much"]}, "has weight='much'; it must be a number above 0"),
        ({"instructions": ["/a#weight=-1"]}, "must be a number above 0"),
        ({"instructions": ["/a#weight=0.7", "/b#weight=0.3", "/c"]}, "leave nothing for the sources without a weight"),
        ({"instructions": ["/a#format=poem"]}, "format='poem' of '/a' is not one of messages, sharegpt"),
        ({"preferences": ["/a#format=alpaca"]}, "format='alpaca' of '/a' is not one of pair, transcripts"),
        ({"instructions": ["/a", "/a#weight=0.5"]}, r"instructions: \['/a'\] appear twice"),
        ({"instructions": ["derived#format=alpaca", "/a"]}, "'derived#format=alpaca' has options"),
        ({"instructions": ["/a#first=0&second=1"]}, "first= and second= of '/a' say which response"),
        ({"preferences": ["/a#first=1"]}, "needs both first= and second="),
        (
            {"instructions": ["/a#weight=1"], "overrides": {"sft.mixture": [{"source": "/a", "weight": 1}]}},
            "instructions have weights and sft.mixture",
        ),
        (
            {"overrides": {"tokenize.chat_template": "chatml"}},
            "'chatml' is neither 'auto', 'own', 'infer', 'plain' nor the text",
        ),
    ],
)
def test_what_is_wrong_with_a_source_is_said(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"recipe": "tiny", **values})


def test_other_signs_in_names_are_no_options() -> None:
    config = resolve({"recipe": "tiny", "instructions": ["/data/c#.jsonl", "/data/a#1/b=2.jsonl"]})
    assert list(config.curate.outside_sources)[1:] == ["/data/c#.jsonl", "/data/a#1/b=2.jsonl"]


def test_text_that_no_file_can_hold_is_refused_by_the_name_of_its_field() -> None:
    with pytest.raises(ConfigError, match=r"report\.title: it holds half a character"):
        resolve({"overrides": {"report.title": "\ud800"}})
    with pytest.raises(ConfigError, match=r"curate\.exclude_packages: it holds half a character"):
        resolve({"overrides": {"curate.exclude_packages": ["x", "\udfff"]}})


def resolved_with(primary: list[str] | None = None, guards: list[str] | None = None, **values: Any) -> PipelineConfig:
    overrides: dict[str, Any] = {"promote.guards": [{"suite": name, "margin": 0.1} for name in guards or ()]}
    if primary:
        overrides["promote.primary"] = primary
    return resolve({"recipe": "tiny", **values, "overrides": overrides})


def test_a_misspelled_suite_would_guard_nothing_so_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"promote\.guards names the suite 'langauge'.*allowed: language, ") as guard:
        resolved_with(guards=["pairs", "langauge"])
    assert guard.value.advice == "Did you mean 'language'?"
    with pytest.raises(ConfigError, match=r"promote\.primary names the suite 'golden'") as primary:
        resolved_with(primary=["pairs", "golden"])
    assert primary.value.advice == "Did you mean 'gold'?"
    with pytest.raises(ConfigError, match="'gold_agreement'"):
        resolved_with(primary=["gold_agreement"])  # it measures no language model


def test_suites_of_the_benchmarks_of_the_run_may_guard() -> None:
    of_rows = {"benchmarks": ["/data/arc.jsonl", "/data/b.csv#name=facts", "refusals", "heldout-question"]}
    names = ["arc", "arc-raw", "facts", "refusals", "over-refusals", "heldout-question"]
    config = resolved_with(guards=names, **of_rows)
    assert [guard.suite for guard in config.promote.guards] == names
    for name in ("arc", "heldout-question-raw", "refusals-greedy"):
        with pytest.raises(ConfigError, match=f"'{name}'"):
            resolved_with(guards=[name], benchmarks=["refusals", "heldout-question"])


def test_suites_of_a_task_are_known_when_it_has_been_looked_at() -> None:
    config = resolved_with(guards=["my_task_em"], benchmarks=["/tasks/my.yaml", "/data/arc.jsonl"])
    check_suites(config, {"/tasks/my.yaml": ["my_task_em"], "/data/arc.jsonl": ["arc", "arc-raw"]})
    with pytest.raises(ConfigError, match=r"'my_task_em'.*allowed: .*, my_task_f1, arc") as caught:
        check_suites(config, {"/tasks/my.yaml": ["my_task_f1"], "/data/arc.jsonl": ["arc", "arc-raw"]})
    assert caught.value.advice == "Did you mean 'my_task_f1'?"


RATED = {"preferences": ["/p.jsonl#margin=ratings"]}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"preferences": ["/p.jsonl"], "overrides": {"reward.margin": 1}},
            "reward.margin=1 needs a source of preferences",
        ),
        ({"alignment": "ppo", **RATED}, "margin= of '/p.jsonl#margin=ratings' counts nowhere, because reward.margin=0"),
        ({"instructions": ["/a#margin=x"]}, "margin= of '/a' says how much better"),
    ],
)
def test_margins_that_come_from_nowhere_or_count_nowhere_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"recipe": "tiny", **values})


def test_margins_that_count_are_part_of_what_is_curated() -> None:
    config = resolve({"recipe": "tiny", **RATED, "overrides": {"reward.margin": 0.5}})
    assert config.curate.preferences == ("/p.jsonl#margin=ratings",)
    assert list(config.curate.outside_sources)[-1] == "/p.jsonl"
    resolve({"recipe": "tiny", **RATED, "last_stage": "tokenize"})  # a later run may train on it


def test_reasons_are_one_setting_in_whatever_order_and_leave_earlier_fingerprints_as_they_were() -> None:
    given = {"recipe": "tiny", "preferences": ["/p.jsonl"]}
    plain = resolve(given).reward
    both, turned = (
        resolve({**given, "overrides": {"reward.reasons": reasons}}).reward
        for reasons in (["harmless", "helpful"], ["helpful", "harmless", "helpful"])
    )
    assert both.identity() == turned.identity() != plain.identity()
    assert "reasons" not in plain.identity()
    assert [area.value for area in both.reasons] == ["helpful", "harmless"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"overrides": {"dpo.reasons": ["harmful"]}},
            r"dpo.reasons.0='harmful': Input should be 'helpful', 'honest' or 'harmless'",
        ),
        (
            {"preferences": ["derived"], "overrides": {"reward.reasons": ["helpful"]}},
            r"reward.reasons=\['helpful'\] needs a source of preferences with reasons, got \['derived'\]",
        ),
    ],
)
def test_reasons_that_no_pair_can_have_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"recipe": "tiny", "preferences": ["/p.jsonl"], **values})


def test_reasons_of_a_stage_that_is_not_in_the_run_are_no_matter() -> None:
    resolve(
        {"recipe": "tiny", "preferences": ["derived"], "alignment": "ppo", "overrides": {"dpo.reasons": ["honest"]}}
    )
