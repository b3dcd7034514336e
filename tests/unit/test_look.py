"""`python -m stages.look` as its job runs it, and what it finds out about a model."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import ones
from transformers import LlamaConfig, LlamaForSequenceClassification

from operators.plan import make_plan
from operators.plan_page import as_markdown, as_table
from stages.artifacts.addresses import artifact_uri, open_store
from stages.artifacts.manifests import content_digest, publish, upload_files
from stages.artifacts.store import Store, write_json
from stages.config.errors import Category, ConfigError, DataError, ExitCode
from stages.config.estimate import count_parameters
from stages.config.graph import GRAPH, Stage
from stages.config.look import Look, LookRequest, given_models, look_key
from stages.config.pipeline import PipelineConfig
from stages.config.records import parse_record
from stages.config.request import REQUEST_DIGEST, ArtifactRef, Failure, Manifest, RunInfo, sha256_of
from stages.config.resolve import resolve
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.tokenizer import CHAT_TEMPLATE, train_tokenizer
from stages.look import look_at, main
from tests.gguf_files import small_llama, write_gguf
from tests.places import REPOSITORY
from tests.unit.models.test_given import save

RUN = RunInfo(run_id="r", name="n")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    return train_tokenizer(iter([str(TokenizeConfig.__doc__) + Path(__file__).read_text()]), config).backend


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return save(tmp_path / "model", tokenizer, template=CHAT_TEMPLATE)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def config_of(uri: Path | str, **params: Any) -> PipelineConfig:
    return resolve({"recipe": "tiny", "base_model": str(uri), "alignment": "dpo", **params})


def request_for(config: PipelineConfig, store_uri: str = "file:///nowhere") -> LookRequest:
    return LookRequest(run=RUN, store_uri=store_uri, config=config.model_dump(mode="json"), models=given_models(config))


def test_the_job_writes_what_it_found_and_the_plan_shows_it(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder)
    data = request_for(config, store.root_uri).model_dump_json().encode()
    store.write_bytes(look_key("r", "config.json"), data)
    monkeypatch.setenv(REQUEST_DIGEST, sha256_of(data))
    assert main([f"{store.root_uri}/{look_key('r', 'config.json')}"]) == ExitCode.OK
    found = parse_record(Look, store.read_bytes(look_key("r", "result.json")), "result")
    facts = found.of("base_model")
    assert facts is not None
    assert facts.shape is not None
    assert (facts.architecture, facts.vocab_size, facts.context) == ("LlamaForCausalLM", 300, 2048)
    # Two matrices of 300 x 16; in the layer q k v o and gate up down of 16 x 16 each, two norms; and the last norm.
    assert facts.parameters == 2 * 300 * 16 + 7 * 16 * 16 + 2 * 16 + 16 == count_parameters(facts.shape, 300)
    assert facts.template == "its own chat template, the assistant's turns marked in it"
    assert set(facts.memory_bytes) == {"sft", "dpo"}
    assert not facts.notes
    assert not facts.warnings
    plan = make_plan(config, run=RUN, store=store)
    sft = plan.of(Stage.SFT).estimate
    assert sft is not None
    assert (sft.parameters, sft.memory_bytes) == (facts.parameters, facts.memory_bytes["sft"])
    assert sft.seconds
    assert not any("unknown until a stage has loaded it" in line for line in as_table(plan))
    assert facts.summary() in as_table(plan)
    assert "## Given models" in as_markdown(plan)


def test_without_a_look_the_plan_is_as_before(folder: Path, store: Store) -> None:
    plan = make_plan(config_of(folder), run=RUN, store=store)
    assert plan.models == ()
    assert any("unknown until a stage has loaded it" in line for line in as_table(plan))


def test_a_refused_model_ends_the_process_as_config_with_a_record(folder: Path, store: Store) -> None:
    """In a process of its own, as Ray starts it."""
    (folder / "config.json").write_text("{")
    store.write_bytes(
        look_key("r", "config.json"), request_for(config_of(folder), store.root_uri).model_dump_json().encode()
    )
    done = subprocess.run(
        [sys.executable, "-m", "stages.look", f"{store.root_uri}/{look_key('r', 'config.json')}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == ExitCode.CONFIG, done.stderr
    failure = parse_record(Failure, store.read_bytes(look_key("r", "failure.json")), "failure")
    assert failure.category == Category.CONFIG
    assert f"{folder}/config.json is not valid JSON" in failure.message
    assert not store.exists(look_key("r", "result.json"))
    assert "[run=r stage=look]" in done.stdout


def test_a_request_that_was_changed_is_not_obeyed(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_bytes(look_key("r", "config.json"), request_for(config_of(folder)).model_dump_json().encode())
    monkeypatch.setenv(REQUEST_DIGEST, "0" * 64)
    assert main([f"{store.root_uri}/{look_key('r', 'config.json')}"]) == ExitCode.DATA


def publish_model(store: Store, folder: Path, kind: str = "sft-model") -> ArtifactRef:
    files = upload_files(store, folder, kind=kind, fingerprint="f")
    manifest = Manifest(
        kind=kind,
        stage=next(spec.stage for spec in GRAPH.values() if spec.kind == kind),
        version=1,
        fingerprint="f",
        digest=content_digest(files),
        files=files,
        inputs=(),
        config={},
        execution={},
        created_at="2026-11-23T09:00:00+00:00",
    )
    publish(store, manifest)
    return manifest.ref(artifact_uri(store, kind, "f"))


def test_an_artifact_is_looked_at_by_its_small_files_and_told_by_its_address(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    ref = publish_model(store, folder)
    config = config_of(ref.uri).with_given({"base_model": ref})
    (facts,) = look_at(request_for(config)).models
    assert (facts.uri, facts.architecture, facts.parameters) == (ref.uri, "LlamaForCausalLM", 11440)
    save_file({"model.norm.weight": ones(16)}, folder / "model.safetensors")
    other = publish_model(open_store((tmp_path / "other").as_uri()), folder)
    with pytest.raises(ConfigError, match=f"model {other.uri} lacks weights") as refused:
        look_at(request_for(config_of(other.uri).with_given({"base_model": other})))
    assert "/tmp/athanor-look" not in refused.value.message


class _Remote:
    """A store in a folder that says it is none, as a bucket would."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def local_path(self, key: str) -> None:
        return None


def test_the_weights_of_a_bucket_are_not_fetched_and_that_is_said(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = publish_model(store, folder)
    read: list[str] = []
    remote = _Remote(store)

    def read_file(ref: ArtifactRef, name: str) -> bytes:
        read.append(name)
        return (folder / name).read_bytes()

    monkeypatch.setattr("stages.models.outline.split_artifact_uri", lambda uri: (remote, uri.split("/store/")[1]))
    monkeypatch.setattr("stages.models.outline.read_file", read_file)
    (facts,) = look_at(request_for(config_of(ref.uri).with_given({"base_model": ref}))).models
    assert facts.parameters == 11440
    assert "left to the first stage, which fetches them" in facts.notes[0]
    assert "model.safetensors" not in read


class _Hub:
    """What the hub answers about one repository; weights can be asked for their headers alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, list[str]()

    def model_info(self, repo: str) -> Any:
        return type("Info", (), {"sha": "c0ffee", "siblings": []})

    def list_repo_files(self, repo: str, *, revision: str) -> list[str]:
        assert revision == "c0ffee"
        return [path.name for path in self.folder.iterdir()]

    def parse_safetensors_file_metadata(self, repo: str, name: str, *, revision: str) -> Any:
        from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo

        from stages.models.hollow import read_header

        tensors = {
            weight: TensorInfo(found["dtype"], found["shape"], tuple(found["data_offsets"]))
            for weight, found in read_header(self.folder / name).items()
        }
        return SafetensorsFileMetadata(metadata={}, tensors=tensors)

    def snapshot(self, repo: str, *, revision: str, allow_patterns: list[str], local_dir: Path) -> None:
        from fnmatch import fnmatch

        local_dir.mkdir(parents=True)
        for path in self.folder.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                self.fetched.append(path.name)
                (local_dir / path.name).write_bytes(path.read_bytes())


def test_of_a_repository_only_small_files_and_headers_are_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _Hub(folder)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot)
    (facts,) = look_at(request_for(config_of("org/name"))).models
    assert (facts.uri, facts.revision, facts.parameters) == ("org/name", "c0ffee", 11440)
    assert "config.json" in hub.fetched
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
    save_file({"model.norm.weight": ones(16)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="model org/name lacks weights"):
        look_at(request_for(config_of("org/name")))


def test_too_little_memory_is_a_warning_that_says_what_helps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 1000}))
    (facts,) = look_at(request_for(config_of(folder))).models
    assert [warning.partition(" ")[0] for warning in facts.warnings] == ["sft", "dpo"]
    assert "set sft.lora.rank, execution.sft.gradient_checkpointing" in facts.warnings[0]


def test_a_model_of_many_billions_is_looked_at_in_no_memory(folder: Path) -> None:
    """Its headers say what it is; nothing is as large as they say."""
    from transformers import AutoModelForCausalLM

    from stages.models.hollow import hollow_model, write_hollow_file

    large = LlamaConfig(
        vocab_size=300, hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64
    )
    large.save_pretrained(folder)
    model = hollow_model(AutoModelForCausalLM, folder, with_weights=False).model
    place, tensors = 0, {}
    for name, weight in model.state_dict().items():
        tensors[name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [place, place + 2 * weight.numel()],
        }
        place += 2 * weight.numel()
    write_hollow_file(folder / "model.safetensors", tensors)
    (facts,) = look_at(request_for(config_of(folder))).models
    assert facts.parameters == 4 * (4 * 8192**2 + 3 * 8192 * 28672 + 2 * 8192) + 2 * 300 * 8192 + 8192
    assert facts.parameters > 3_800_000_000


def test_a_reevaluation_looks_at_its_model_with_its_tokens(folder: Path, store: Store, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    (tokens / "tokenizer").mkdir(parents=True)
    (tokens / "tokenizer" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    meta = {"sequence_length": 4096, "vocab_size": 300, "pad_id": 2, "eos_id": 1, "bos_id": 0}
    (tokens / "meta.json").write_text(json.dumps(meta))
    given = {"tokens": publish_model(store, tokens, "tokens"), "sft": publish_model(store, folder)}
    config = resolve({"recipe": "tiny"}).model_copy(update={"only": Stage.EVALUATE, "given": given})
    assert [model.role for model in given_models(config)] == ["sft"]
    with pytest.raises(ConfigError, match="sequence_length=4096 but the model has only 2048 positions"):
        look_at(request_for(config))


def scorer(folder: Path, tokenizer: Tokenizer, *, outputs: int = 1) -> Path:
    """A reward model as a user would bring it: with fewer and narrower layers than the policy."""
    save(folder, tokenizer, template=CHAT_TEMPLATE)
    config = LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.num_labels = outputs
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_given_reward_model_is_looked_at_beside_the_policy(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    given = {"alignment": "ppo", "reward_model": str(scorer(tmp_path / "scorer", tokenizer))}
    policy, reward = look_at(request_for(config_of(folder, **given))).models
    assert (reward.role, reward.architecture) == ("reward_model", "LlamaForSequenceClassification")
    assert set(policy.memory_bytes) == {"sft", "ppo"}
    assert set(reward.memory_bytes) == {"ppo"}, "its critic starts as this model"
    assert reward.parameters is not None
    assert policy.parameters is not None
    assert reward.parameters < policy.parameters


@pytest.mark.parametrize("role", ["reward_model", "reward_base"])
def test_a_scorer_with_another_tokenizer_is_refused_before_anything_is_spent(
    role: str, folder: Path, tmp_path: Path
) -> None:
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    other = train_tokenizer(iter([(REPOSITORY / "README.md").read_text()]), config).backend
    given = {"alignment": "ppo", role: str(scorer(tmp_path / "scorer", other))}
    with pytest.raises(ConfigError, match=rf"{role}: the tokenizer in .* is not that of the policy"):
        look_at(request_for(config_of(folder, **given)))


def test_a_model_of_two_outputs_and_one_of_text_are_no_reward_models(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    two = scorer(tmp_path / "two", tokenizer, outputs=2)
    for wrong, message in ((two, "has 2 outputs"), (folder, "which gives no scores")):
        with pytest.raises(ConfigError, match=message):
            look_at(request_for(config_of(folder, alignment="ppo", reward_model=str(wrong))))


def test_what_judges_may_have_a_tokenizer_of_its_own_and_must_be_of_its_kind(folder: Path, tmp_path: Path) -> None:
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    other = train_tokenizer(iter([(REPOSITORY / "README.md").read_text()]), config).backend
    gold = scorer(tmp_path / "gold", other)
    given = {"gold_model": str(gold), "judge": str(folder)}
    policy, looked_at, judge = look_at(request_for(config_of(folder, alignment="dpo", **given))).models
    assert set(policy.memory_bytes) == {"sft", "dpo"}
    assert (looked_at.role, looked_at.architecture) == ("gold_model", "LlamaForSequenceClassification")
    assert (judge.role, judge.architecture) == ("judge", "LlamaForCausalLM")
    assert not looked_at.memory_bytes | judge.memory_bytes  # neither is trained
    with pytest.raises(ConfigError, match=r"gold_model=.*which gives no scores"):
        look_at(request_for(config_of(folder, alignment="dpo", gold_model=str(folder))))


def test_a_gold_scorer_with_a_tokenizer_of_its_own_gives_ppo_no_scores(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """PPO trains all the same, unless it should end by them."""
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    other = train_tokenizer(iter([(REPOSITORY / "README.md").read_text()]), config).backend
    own, shared = scorer(tmp_path / "own", other), scorer(tmp_path / "shared", tokenizer)
    patient = {"ppo.gold_patience": 1, "ppo.eval_every": 1}

    def looked_at(gold: Path, **overrides: Any) -> Any:
        asked = config_of(folder, alignment="ppo", gold_model=str(gold), overrides=overrides)
        return look_at(request_for(asked)).of("gold_model")

    assert looked_at(own).notes == (
        "its tokenizer is not the policy's: it judges in `evaluate`, and not while PPO trains",
    )
    found = looked_at(shared, **patient)
    assert not found.notes
    assert not found.memory_bytes  # PPO reads it and trains another
    with pytest.raises(ConfigError, match=r"gold_model: the tokenizer in .* is not that of the policy"):
        looked_at(own, **patient)


def test_what_a_reward_model_is_trained_from_may_be_smaller(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    smaller = scorer(tmp_path / "smaller", tokenizer)
    policy, base = look_at(request_for(config_of(folder, alignment="ppo", reward_base=str(smaller)))).models
    assert set(policy.memory_bytes) == {"sft", "ppo"}
    assert (base.role, set(base.memory_bytes)) == ("reward_base", {"reward"})


def test_the_header_of_a_gguf_file_is_looked_at_with_its_template(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "small.gguf", small_llama())
    (facts,) = look_at(request_for(config_of(file))).models
    assert (facts.architecture, facts.vocab_size, facts.context) == ("LlamaForCausalLM", 320, 256)
    assert "inferred" in facts.template
    odd = write_gguf(tmp_path / "odd.gguf", small_llama(), architecture="unheard")
    with pytest.raises(ConfigError, match="transformers cannot read architecture 'unheard'"):
        look_at(request_for(config_of(odd)))


def test_a_wrong_command_line_is_told() -> None:
    assert main([]) == ExitCode.CONFIG
    assert main(["nowhere"]) == ExitCode.CONFIG


def test_the_record_is_the_plans_only_source(store: Store) -> None:
    config = config_of("/models/x")
    write_json(store, look_key("r", "result.json"), {"models": [{"role": "base_model", "uri": "/models/x"}]})
    assert make_plan(config, run=RUN, store=store).models[0].summary() == "base_model='/models/x': nothing is known"


def test_benchmarks_are_read_before_anything_is_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "b.jsonl"
    rows = [{"query": "q", "choices": ["x", "y"], "gold": 1, "id": number} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "gold": 7, "id": "bad"}]))
    config = resolve({"recipe": "tiny", "benchmarks": [f"{path}#name=mine", "refusals"]})
    request = LookRequest(run=RUN, store_uri="file:///nowhere", config=config.model_dump(mode="json"), models=())
    with caplog.at_level("INFO"):
        found = look_at(request).benchmarks
    assert [(facts.suite, facts.items, facts.bad) for facts in found] == [
        ("mine", 40, {"gold_out_of_range": 1}),
        ("mine-raw", 40, {"gold_out_of_range": 1}),
    ]
    assert "suite mine, 40 items, accuracy; rows that are no items: {'gold_out_of_range': 1}" in caplog.text
    path.write_text(path.read_text().replace('"gold": 1', '"gold": null'))
    with pytest.raises(DataError, match=r"41 of 41 rows are no items \(row 1: missing_gold, "):
        look_at(request)


def test_suites_of_one_name_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tasks are called is known from their files alone."""
    from stages.judge.benchmarks import suites

    names = {"one.yaml": "same", "two.yaml": "same", "three.yaml": "kl", "four.yaml": "over-refusals"}

    def called(benchmark: Any, scratch: Path, **more: Any) -> list[Any]:
        name = names[benchmark.uri.rpartition("/")[2]]
        return [SimpleNamespace(name=name, metric="acc", items=3, bad={})]

    monkeypatch.setattr(suites, "suites_from_outside", called)

    def look(*files: str) -> Any:
        config = resolve({"recipe": "tiny", "benchmarks": ["refusals", *(f"{tmp_path}/{file}" for file in files)]})
        request = LookRequest(run=RUN, store_uri="file:///nowhere", config=config.model_dump(mode="json"), models=())
        return look_at(request)

    assert [facts.suite for facts in look("one.yaml").benchmarks] == ["same"]
    with pytest.raises(ConfigError, match=r"two.yaml' makes a suite 'same', and another benchmark makes a suite of"):
        look("one.yaml", "two.yaml")
    with pytest.raises(ConfigError, match=r"makes a suite 'kl', and every evaluation has a suite of that name"):
        look("three.yaml")
    with pytest.raises(ConfigError, match=r"makes a suite 'over-refusals', and another benchmark"):
        look("four.yaml")


def test_refusals_by_a_judge_need_one_before_anything_is_trained() -> None:
    config = resolve({"recipe": "tiny", "benchmarks": ["refusals#judge=true"]})
    request = LookRequest(run=RUN, store_uri="file:///nowhere", config=config.model_dump(mode="json"), models=())
    with pytest.raises(ConfigError, match="'refusals' has judge=true, and the run has no judge"):
        look_at(request)


def test_a_run_that_does_not_evaluate_reads_no_benchmark(tmp_path: Path) -> None:
    config = resolve({"recipe": "tiny", "benchmarks": [str(tmp_path / "none.jsonl")], "last_stage": "sft"})
    request = LookRequest(run=RUN, store_uri="file:///nowhere", config=config.model_dump(mode="json"), models=())
    assert look_at(request).benchmarks == ()
