"""Whatever a stage refuses about a given model, `resolve` refuses: each refusal in the code has a case, or a reason.

The refusals are collected from the source, so one that is added needs a case here, or a line in LATER.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import httpx
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from stages.config.errors import ConfigError
from stages.config.look import LookRequest, given_models
from stages.config.request import RunInfo
from stages.config.resolve import resolve
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.tokenizer import CHAT_TEMPLATE, train_tokenizer
from stages.look import look_at
from stages.models.build import load_causal_lm, load_reward_model
from stages.models.foreign_code import code_digest
from stages.models.given_tokenizer import given_tokenizer
from stages.models.lora import add_adapter
from tests.places import REPOSITORY
from tests.unit.models import test_hostile_folder as hostile
from tests.unit.models.test_given import AUTO_MAP, UNMARKED, bring_code, save, tokens_of
from tests.unit.test_look import scorer

NOT_OF_A_LOOK = ("find.py",)
"""It finds models for their users; a run's own addresses are refused before the look (operators/test_given.py)."""
SOURCES = [
    *sorted(
        path
        for path in (REPOSITORY / "stages" / "models").glob("*.py")
        if not path.name.startswith("gguf") and path.name not in NOT_OF_A_LOOK
    ),
    *sorted((REPOSITORY / "stages" / "data" / "tokens").glob("*.py")),
    *(
        REPOSITORY / "stages" / "train" / "engines" / name
        for name in ("tensor_parallel.py", "pipeline.py", "torch_engine.py")
    ),
]

LATER = {
    # By `resolve`, for which the configuration alone is enough (test_resolve.py):
    "needs a GPU, and this worker has none": "resolve refuses 4 bits without gpus_per_worker; whether there is one, a "
    "worker sees",
    "optimizer.algorithm=muon needs whole matrices": "resolve",
    "an adapter (lora.rank) does not go with": "resolve",
    "runs the bare next-token loss": "resolve; experts of a given model are refused by the look",
    # By a stage:
    "peft puts adapters of": "asked in the look too, but no architecture is known with which peft does it",
    "needs bitsandbytes, which is not installed": "the workers' image decides; the look may run in another one",
    "says members=": "the record of an ensemble, which `reward` writes; a given folder is loaded by the first stage",
    "is an ensemble of": "the same",
    "but the text supports only": "a tokenizer that the run trains, which no given model has",
}
"""What the look cannot refuse, by a part of its message."""

LATER_WITHOUT_A_MESSAGE_OF_OURS = {
    "numbers that are not finite, or that make none": "the weights are not read",
    "a file of weights that is corrupt behind its header": "the weights are not read; those of an artifact are hashed "
    "when they are fetched",
    "weights of an artifact in a bucket that do not fit its config.json": "no header is fetched; we wrote both",
    "rows that the chat template refuses, or texts that cannot be encoded": "the rows are not read yet; they "
    "are dropped with a counted reason",
    "code of a model that fails on longer rows or on another device": "it is run once, on twelve tokens, small",
    "an architecture of which no small model can be made": "the look says so; the first stage checks the whole model",
    "too little memory": "what other machines have is not known; the look warns",
    "numbers of a GGUF file that make no model": "`convert` unpacks them; the header, its settings and its tokenizer "
    "are looked at (test_look.py), unless the file is on the hub or in a bucket",
    "a model that changes between the look and the stage": "each stage pins what it finds",
}
"""What else is found only by a stage, and why. For people; tests cannot look into what is not there."""


@dataclass(frozen=True)
class Case:
    """A folder that is spoilt, the settings of the run, and what is said about it."""

    says: str
    spoil: Callable[[Path], object] = lambda folder: None
    overrides: dict[str, Any] = field(default_factory=dict)
    template: str | None = CHAT_TEMPLATE
    environment: dict[str, str] = field(default_factory=dict)
    by_engine: bool = False
    """Said by an engine, which needs several processes."""


def with_json(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: hostile.change(folder, name, **values)


def with_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_template(template: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        hostile.change(folder, "tokenizer_config.json", chat_template=template)

    return change


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def with_code(*, auto_map: Any = AUTO_MAP) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        bring_code(folder, sign=folder.parent / "ran", auto_map=auto_map)

    return change


WITHOUT_SCORE = """
from .own import OwnForCausalLM

class OwnForSequenceClassification(OwnForCausalLM):
    pass
"""


def with_code_without_score(folder: Path) -> None:
    with_code(auto_map={**AUTO_MAP, "AutoModelForSequenceClassification": "head.OwnForSequenceClassification"})(folder)
    (folder / "head.py").write_text(WITHOUT_SCORE)


def of_architecture(model: Any) -> Callable[[Path], None]:
    return lambda folder: model.save_pretrained(folder)


SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def granite() -> Any:
    return GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS, logits_scaling=8.0))  # type: ignore[arg-type]


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2))


def windowed() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=32))  # type: ignore[arg-type]


def with_a_word_level_tokenizer(folder: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "<|end|>": 1}, "unk_token": "absent"}
    hostile.change(folder, "tokenizer.json", model=model, added_tokens=[], pre_tokenizer=None, post_processor=None)
    hostile.change(folder, "tokenizer_config.json", bos_token=None, eos_token="<|end|>")


TURN = "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
PROMPTED = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
MARKED = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}" + PROMPTED
OWN = {"tokenize.chat_template": "own"}


def marked(answer: str, *, before: str = "", prompt: str = PROMPTED) -> str:
    return (
        before
        + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + answer
        + "{% else %}"
        + TURN
        + "{% endif %}{% endfor %}"
        + prompt
    )


def engine(stage: str = "sft", **settings: Any) -> dict[str, Any]:
    return {f"execution.{stage}.{name}": value for name, value in {"engine": "fsdp", **settings}.items()}


CASES = {
    # the folder
    "weights behind a link": Case("a link that leads out", hostile.with_weights_linked_from_elsewhere),
    "a fifo": Case("no regular file", hostile.with_a_fifo),
    "a config that is no JSON": Case("is not valid JSON", with_text("config.json", "{")),
    "a config that is a list": Case("not a JSON object", with_text("config.json", "[]")),
    "no config": Case("has no config.json", without("config.json")),
    "pickled weights": Case(r"has no \*.safetensors", without("model.safetensors")),
    "an adapter": Case("the folder holds an adapter", hostile.with_an_adapter_of_another_model),
    "a distributed checkpoint": Case("parts of a distributed checkpoint", hostile.with_a_distributed_checkpoint),
    "other files": Case("names other files", hostile.with_nested_weights),
    "a kernel of the hub": Case("wants code from the hub", hostile.with_a_kernel_of_the_hub),
    "an index without a map": Case("has no weight_map", hostile.with_an_index_without_a_map),
    "an index that leads out": Case("names .*; allowed are", hostile.with_an_index_that_leads_out),
    "an index of absent files": Case("which the folder does not hold", hostile.with_an_index_of_absent_files),
    # code
    "code that is not allowed": Case("brings code of its own", with_code()),
    "code of another repository": Case(
        "wants code of another repository", with_code(auto_map={**AUTO_MAP, "AutoConfig": "org/other--own.OwnConfig"})
    ),
    "an auto_map that is a list": Case("is no object of classes", with_code(auto_map=[1])),
    "a wrong list of allowed code": Case(
        "SHA-256 digests of code", with_code(), environment={"ATHANOR_ALLOW_REMOTE_CODE": "org/name"}
    ),
    "code without a classifier": Case(
        "the code that .* brings makes no", with_code(), environment={"ATHANOR_ALLOW_REMOTE_CODE": "of the folder"}
    ),
    "code without a head": Case(
        "has no linear `score` head",
        with_code_without_score,
        environment={"ATHANOR_ALLOW_REMOTE_CODE": "of the folder"},
    ),
    # the tokenizer
    "no tokenizer": Case("no tokenizer in", with_text("tokenizer.json", "{}")),
    "a slow tokenizer": Case(
        "not a fast tokenizer",
        lambda folder: (
            without("tokenizer.json")(folder),
            with_json("tokenizer_config.json", tokenizer_class="ByT5Tokenizer")(folder),
        ),
    ),
    "no end token": Case("has no end token", with_json("tokenizer_config.json", eos_token=None)),
    "a tokenizer for another model": Case(
        "not a pair", lambda folder: save(folder, None, vocab_size=200), template=None
    ),
    "ids beyond memory": Case("have ids up to", with_json("config.json", vocab_size=(1 << 24) + 8)),
    "a length that is no number": Case(
        "has model_max_length=", with_json("tokenizer_config.json", model_max_length="long")
    ),
    "a tokenizer that cannot encode": Case(
        "cannot encode a text", with_a_word_level_tokenizer, {"tokenize.chat_template": "plain"}, template=None
    ),
    # the chat template
    "templates without a default": Case("none called", with_template([{"name": "tools", "template": "x"}]), OWN),
    "a template that is no text": Case("which is no text", with_template(7), OWN),
    "powers in a template": Case("computes powers", with_template("{{ 2 ** 9 }}" + MARKED), OWN),
    "a template without markers": Case(r"no \{% generation %\} markers", overrides=OWN, template=UNMARKED),
    "a template without an end": Case("writes no control token after", with_template(MARKED), OWN),
    "a template that ends earlier turns only": Case(
        "ends an earlier turn of the assistant with .* with no control token",
        with_template(
            marked(
                "<|assistant|>{% generation %}{{ m['content'] }}{{ '' if loop.last else '<|end|>' }}{% endgeneration %}"
            )
        ),
        OWN,
    ),
    "a template with two ends": Case(
        "ends the last turn with .* and an earlier one with",
        with_template(
            marked(
                "<|assistant|>{% generation %}{{ m['content'] }}{{ '<|pad|>' if loop.last else '<|end|>' }}"
                "{% endgeneration %}"
            )
        ),
        OWN,
    ),
    "a template without room": Case(
        "cannot hold a question", with_template("{% generation %}no{% endgeneration %}"), OWN
    ),
    "a template that never ends": Case(
        "does not end",
        with_template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + MARKED),
        OWN,
    ),
    "a template that ends no turn": Case(
        "does not train each assistant turn",
        with_template(marked("<|assistant|>{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>")),
        OWN,
    ),
    "another prompt than in training": Case(
        "its generation prompt .* differs from what precedes",
        with_template(
            marked(
                "<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}",
                prompt="{% if add_generation_prompt %}<|system|>{% endif %}",
            )
        ),
        OWN,
    ),
    "a begin token in the middle": Case(
        "writes the begin token",
        with_template(
            marked(
                "<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}",
                before="{{ bos_token }}{{ bos_token }}",
            )
        ),
        OWN,
    ),
    # the architecture and its weights
    "no configuration of a language model": Case(
        "is no configuration of a language model", with_json("config.json", model_type="no-such-architecture")
    ),
    "no number of tokens": Case("which is no number of tokens", with_json("config.json", vocab_size=-1)),
    "a library that is not installed": Case(
        "a library that is not installed",
        with_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    "settings that make no model": Case("make no AutoModel", with_json("config.json", hidden_act="no_such_function")),
    "weights that are missing": Case(
        "lacks weights: model.norm", with_weights(lambda all: all.pop("model.norm.weight"))
    ),
    "weights of another shape": Case(
        "make no AutoModel", with_weights(lambda all: all.update({"model.norm.weight": torch.ones(3, 5)}))
    ),
    "a header that is cut": Case(
        "make no AutoModel", lambda folder: hostile.break_file(folder / "model.safetensors", b"x")
    ),
    "logits that are scaled": Case("cannot be trained on packed documents", of_architecture(granite())),
    "a short context": Case("has only 32 positions", with_json("config.json", max_position_embeddings=32)),
    # what the run does with it
    "an adapter on nothing": Case(
        "has none of the kind 'nothing'", overrides={"dpo.lora.rank": 2, "dpo.lora.target_modules": ["nothing"]}
    ),
    "heads that cannot be dealt": Case(
        "does not divide the model's num_attention_heads=2",
        overrides=engine(num_workers=4, tensor_parallel=4),
        by_engine=True,
    ),
    "an architecture without a plan": Case(
        "has no plan that could be followed",
        of_architecture(gpt2()),
        engine(num_workers=2, tensor_parallel=2),
        by_engine=True,
    ),
    "an architecture that is no stack": Case(
        "is not a stack of `layers`",
        of_architecture(gpt2()),
        engine(num_workers=2, pipeline_parallel=2),
        by_engine=True,
    ),
    "more stages than layers": Case(
        "more than the model's 1 layers", overrides=engine(num_workers=2, pipeline_parallel=2), by_engine=True
    ),
    "a window in a pipeline": Case(
        "has an attention of its own",
        of_architecture(windowed()),
        engine(num_workers=2, pipeline_parallel=2),
        by_engine=True,
    ),
}


@dataclass(frozen=True)
class Site:
    """One place in the source that refuses something."""

    file: str
    pattern: re.Pattern[str]
    text: str


@cache
def refusals() -> tuple[Site, ...]:
    """Every ConfigError that the files of models, tokens and parallel engines make, with its message as a pattern."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ConfigError" and node.args:
                parts = _parts(node.args[0])
                pattern = "".join(re.escape(part) if part else r"[\s\S]*" for part in parts)
                found.append(Site(path.name, re.compile(pattern), "".join(part or "..." for part in parts)))
    return tuple(found)


def _parts(message: ast.expr) -> list[str]:
    """Literal parts of a message, with '' for what is filled in."""
    match message:
        case ast.Constant(value=str() as text):
            return [text]
        case ast.JoinedStr(values=values):
            return [part for value in values for part in (_parts(value) if isinstance(value, ast.Constant) else [""])]
        case ast.BinOp(left=left, right=right):
            return [*_parts(left), *_parts(right)]
        case _:
            return [""]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    return train_tokenizer(iter([str(TokenizeConfig.__doc__) + Path(__file__).read_text()]), config).backend


@pytest.fixture
def folder(case: Case, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = save(tmp_path / "model", tokenizer, template=case.template)
    case.spoil(made)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, code_digest(made) if value == "of the folder" else value)
    return made


def look(folder: Path | str, overrides: dict[str, Any], **params: Any) -> Any:
    settings = {"tokenize.sequence_length": 64, **overrides}
    config = resolve(
        {"recipe": "tiny", "base_model": str(folder), "alignment": "both", "overrides": settings, **params}
    )
    request = LookRequest(
        run=RunInfo(run_id="r", name="n"),
        store_uri="file:///nowhere",
        config=config.model_dump(mode="json"),
        models=given_models(config),
    )
    return look_at(request)


SEEN: dict[str, str] = {}
"""What the look said in each case, for the last test."""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.timeout(120)
def test_the_look_refuses_it_as_a_stage_would(case: Case, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=case.says) as refused:
        look(folder, case.overrides)
    said = refused.value.message
    assert refused.value.advice
    SEEN[case.says] = said
    if not case.by_engine:
        with pytest.raises(ConfigError) as of_stage:
            through_the_stages(folder, case.overrides, tmp_path / "tokens")
        assert start(of_stage.value.message) == start(said)


def start(message: str) -> str:
    """A message up to what a library says, which may be another word for the same."""
    return re.split(r"(?<=make no AutoModelForCausalLM): |(?<=brings makes no AutoModel)", message)[0]


def through_the_stages(folder: Path, overrides: dict[str, Any], scratch: Path) -> None:
    """What tokenize, sft, reward, ppo and dpo read of a given model, without their data."""
    config = resolve({"recipe": "tiny", "base_model": str(folder), "alignment": "both", "overrides": overrides})
    tokenizer = given_tokenizer(folder, chat_template=config.tokenize.chat_template)
    tokenizer.chat().check()
    tokens = tokens_of(tokenizer, scratch)
    for stage in (config.sft, config.dpo):
        add_adapter(load_causal_lm(folder, tokens, lora=stage.lora), stage.lora, seed=0)
    add_adapter(load_reward_model(folder, tokens, lora=config.reward.lora), config.reward.lora, seed=0)


@pytest.mark.parametrize("uri", ["/nowhere/at/all", "no-such-organisation", "file:///nowhere"])
def test_a_model_that_is_not_there_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="does not exist") as refused:
        look(uri, {})
    SEEN["absent"] = refused.value.message


def test_a_gated_repository_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: object, **__: object) -> None:
        raise GatedRepoError("terms", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", gated)
    with pytest.raises(ConfigError, match="accept its terms") as refused:
        look("org/gated", {})
    SEEN["gated"] = refused.value.message


def test_a_scorer_that_does_not_fit_the_policy_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    policy = save(tmp_path / "policy", tokenizer, template=CHAT_TEMPLATE)
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    other = train_tokenizer(iter([(REPOSITORY / "README.md").read_text()]), config).backend
    for name, wrong in (
        ("text", policy),
        ("outputs", scorer(tmp_path / "two", tokenizer, outputs=2)),
        ("tokenizer", scorer(tmp_path / "other", other)),
    ):
        with pytest.raises(ConfigError, match=r"^reward_model") as refused:
            look(policy, {}, alignment="ppo", reward_model=str(wrong))
        SEEN[f"scorer: {name}"] = refused.value.message


@pytest.mark.parametrize("uri", ["hf://org", "hf://org/repository/absent.gguf"])
def test_a_gguf_file_that_is_not_on_the_hub_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename="there.gguf")]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_: SimpleNamespace(sha="c0ffee", siblings=files))
    with pytest.raises(ConfigError, match=r"hub") as refused:
        look(uri if uri.endswith("gguf") else f"{uri}/x.gguf", {})
    SEEN[uri] = refused.value.message


def test_every_refusal_in_the_source_has_a_case_or_a_reason(request: pytest.FixtureRequest) -> None:
    """Needs the cases above, which pytest runs before it."""
    if len(SEEN) < len({case.says for case in CASES.values()}) + 2:
        pytest.skip("not all cases of this file ran")
    open_sites = [
        f"{site.file}: {site.text}"
        for site in refusals()
        if not any(site.pattern.fullmatch(said) for said in SEEN.values())
        if not any(part in site.text for part in LATER)
    ]
    assert open_sites == []
    stale = [part for part in LATER if not any(part in site.text for site in refusals())]
    assert stale == [], "these reasons are about nothing that the code says"
