"""`python -m stages.look <config uri>`: a look at a run's given models and benchmarks, and whether this cluster opens
the keys of its endpoints, before anything is spent on it.

Everything that a stage would refuse about such a model is refused here, with the stage's own words, because the
stage's own checks are asked: on the model's small files, on its architecture without numbers, and on a small model of
the same architecture. What needs the numbers or the run's rows is left to the stages;
tests/unit/test_look_refuses.py lists it.
"""

import logging
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.artifacts.manifests import read_file
from stages.artifacts.store import Store, write_json
from stages.config.benchmarks import names_of
from stages.config.endpoint_keys import keyed_endpoints_of_run
from stages.config.errors import EXIT_CODES, Category, ConfigError, ExitCode, StageError
from stages.config.estimate import memory_bytes
from stages.config.execution import ExecutionConfig
from stages.config.graph import BASE_MODEL, GOLD_MODEL, GRAPH, JUDGE, REWARD_BASE, REWARD_MODEL, Stage, trained_stages
from stages.config.look import (
    BenchmarkFacts,
    GivenModel,
    Look,
    LookRequest,
    ModelFacts,
    given_benchmarks,
    given_models,
    look_key,
)
from stages.config.pipeline import ONE_VERSION, PipelineConfig
from stages.config.records import first_error
from stages.config.selection import learns_from_scores
from stages.config.text import byte_size
from stages.config.tokens import AUTO
from stages.config.train import ModelConfig, PostTrainConfig, TrainConfig
from stages.job.ending import end
from stages.job.failures import describe_failure
from stages.job.logs import log_for_uri
from stages.job.runner import read_request
from stages.job.stopping import raise_stopped
from stages.models.endpoint.keys import require_keys

logger = logging.getLogger("athanor")

_SCORERS = (REWARD_MODEL, REWARD_BASE)
"""Given models that read the ids that the policy writes."""
_JUDGES = (GOLD_MODEL, JUDGE)
"""Given models that read texts, each with a tokenizer of its own, as far as their context reaches."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m stages.look <config uri>\n")
        return ExitCode.CONFIG
    signal.signal(signal.SIGTERM, raise_stopped)
    uri = arguments[0]
    try:
        log_for_uri(uri)
        request, store = read_request(LookRequest, uri)
    except StageError as error:
        logger.error("%s %s", error.message, error.advice)
        return EXIT_CODES[error.category]
    try:
        if request.models:
            _hush()
        look = look_at(request)
    except BaseException as error:  # noqa: BLE001 - every failure becomes an exit code and a file; none is swallowed
        return _record_failure(store, request, error)
    write_json(store, look_key(request.run.run_id, "result.json"), look.model_dump(mode="json"))
    return ExitCode.OK


def _hush() -> None:
    """Keep reports on weights that were not loaded out of the log: nothing is loaded here."""
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


def look_at(request: LookRequest) -> Look:
    """Look at every model of the request, and open the keys of endpoints; raises ConfigError for the first that a stage
    would refuse."""
    try:
        config = PipelineConfig.model_validate(request.config)
    except ValidationError as error:
        raise ConfigError(f"the stored configuration is not valid: {first_error(error)}", advice=ONE_VERSION) from None
    require_keys(keyed_endpoints_of_run(config), job=request.submission_id)
    found = []
    policy: Any = None
    with tempfile.TemporaryDirectory(prefix="athanor-look-") as scratch:
        for model in request.models:
            text, facts = _looked_at(model, config, Path(scratch), policy)
            policy = text if model.role == BASE_MODEL else policy
            logger.info("%s", facts.summary())
            for warning in facts.warnings:
                logger.warning("%s", warning)
            found.append(facts)
        benchmarks = tuple(_benchmarks(config, Path(scratch)))
    for facts in benchmarks:
        logger.info("%s", facts.summary())
    return Look(models=tuple(found), benchmarks=benchmarks)


def _benchmarks(config: PipelineConfig, scratch: Path) -> Iterator[BenchmarkFacts]:
    """Read all items of all benchmarks: a row that is none must not be found after hours of training."""
    from stages.judge.benchmarks.suites import require_judge, require_own_names, suites_from_outside

    given = given_benchmarks(config)
    chosen = config.evaluate.parsed_benchmarks if Stage.EVALUATE in config.selected else ()
    has_judge = bool(config.evaluate.judge.endpoint) or any(one.role == JUDGE for one in given_models(config))
    require_judge(chosen, has_judge=has_judge)
    # Only the task files say what the suites of tasks are called.
    names = [(one.uri, name) for one in chosen if one.uri not in given for name in names_of(one)]
    for benchmark in chosen:
        if benchmark.uri not in given:
            continue
        found = suites_from_outside(benchmark, scratch / "tasks" / benchmark.suite)
        names += [(benchmark.uri, suite.name) for suite in found]
        require_own_names(names)
        for suite in found:
            yield BenchmarkFacts(
                uri=benchmark.uri, suite=suite.name, metric=suite.metric, items=suite.items, bad=dict(suite.bad)
            )


def _record_failure(store: Store, request: LookRequest, error: BaseException) -> int:
    failure = describe_failure(error, Stage.TOKENIZE)
    if failure.category == Category.OUT_OF_MEMORY:
        advice = "The look needs about a gigabyte for its libraries. Free memory where Ray starts jobs."
        failure = failure.model_copy(update={"advice": advice})
    try:
        write_json(store, look_key(request.run.run_id, "failure.json"), failure.model_dump(mode="json"))
    except Exception as problem:  # noqa: BLE001 - whatever the store's client raises; the exit code still tells the category
        logger.error("failure.json was not written: %s", problem)
    logger.error(
        "%s", f"look failed [{failure.category}]: {failure.message} {failure.advice}\n{failure.detail}".rstrip()
    )
    return EXIT_CODES[Category(failure.category)]


@dataclass(frozen=True)
class _Text:
    """What the run will tokenize with, as far as models must fit it."""

    backend: Any
    sequence_length: int
    pad_id: int
    template: str


def _looked_at(
    model: GivenModel, config: PipelineConfig, scratch: Path, policy: _Text | None
) -> tuple[_Text | None, ModelFacts]:
    """What a model tokenizes with, and the facts; `policy` is what the run's policy tokenizes with, where known."""
    from stages.models.outline import outlined

    with outlined(model, scratch) as outline:
        if outline is None:
            note = "a GGUF file elsewhere, which `convert` fetches and looks at"
            return None, ModelFacts(role=model.role, uri=model.uri, notes=(note,))
        looker = _Looker(model, config, outline, policy)
        return looker.text, looker.facts()


class _Looker:
    """One model through all checks, in the order in which the stages would make them."""

    def __init__(self, model: GivenModel, config: PipelineConfig, outline: Any, policy: _Text | None) -> None:
        from stages.models.folder import check_folder
        from stages.models.foreign_code import may_run_code
        from stages.models.same_tokenizer import check_one_score

        self._model, self._config, self._outline = model, config, outline
        self._folder: Path = outline.folder
        self._notes: list[str] = []
        self._warnings: list[str] = []
        check_folder(self._folder)
        may_run_code(self._folder)
        if model.role == GOLD_MODEL:
            check_one_score(self._folder, role=GOLD_MODEL)
            self._measures_ppo(policy)
        if model.role in _JUDGES:
            self.text = self._own_text(chat_template=AUTO, sequence_length=1)
        else:
            self.text = self._of_policy(policy) if model.role in _SCORERS else self._text()

    def facts(self) -> ModelFacts:
        from stages.models.build import positions_of
        from stages.models.small import check_small_packing

        text = self.text
        hollow = self._loaded(text, scores=self._scores)
        if reason := check_small_packing(self._folder):
            self._notes.append(f"whether it can be trained on packed rows is left to the first stage ({reason})")
        for stage in self._trained_stages():
            self._check_training(stage, text)
        rows = hollow.get_input_embeddings().weight.shape[0]
        parameters = sum(weight.numel() for weight in hollow.parameters())
        shape = shape_of(hollow.config)
        memory = self._memory(shape, parameters, rows)
        self._compare(memory)
        if not self._outline.has_headers:
            self._notes.append("names and shapes of its weights are left to the first stage, which fetches them")
        return ModelFacts(
            role=self._model.role,
            uri=self._model.uri,
            revision=self._outline.revision,
            architecture=type(hollow).__name__,
            parameters=parameters,
            vocab_size=rows,
            context=positions_of(hollow),
            shape=shape,
            template=text.template,
            memory_bytes={stage.value: number for stage, number in memory.items()},
            notes=tuple(self._notes),
            warnings=tuple(self._warnings),
        )

    @property
    def _scores(self) -> bool:
        """Whether the role is that of a model which gives scores, or is made into one."""
        return self._model.role in (*_SCORERS, GOLD_MODEL) or any(
            spec.scores and spec.role == self._model.role for spec in trained_stages()
        )

    def _trained_stages(self) -> Sequence[Stage]:
        """Stages of the run that train this model, or one that is made from it."""
        config, role = self._config, self._model.role
        if role in _JUDGES:
            return []
        trained = [spec.stage for spec in trained_stages() if spec.stage in config.selected]
        if role == BASE_MODEL:
            return [stage for stage in trained if REWARD_BASE not in config.given_roles(stage)]
        return [stage for stage in trained if role in config.given_roles(stage)]

    def _of_policy(self, policy: _Text | None) -> _Text:
        """What the policy tokenizes with, which a model that scores its responses must share."""
        from stages.models.same_tokenizer import check_one_score, check_same_tokenizer

        if self._model.role == REWARD_MODEL:
            check_one_score(self._folder, role=REWARD_MODEL)
        if policy is None:  # of a GGUF file elsewhere, or that of a run that trains its own
            self._notes.append("whether it has the policy's tokenizer is left to the stage that reads both")
            return self._text()
        check_same_tokenizer(self._folder, policy.backend, role=self._model.role)
        return policy

    def _measures_ppo(self, policy: _Text | None) -> None:
        """Whether PPO can read a gold scorer while it trains; raises ConfigError where it should end by its scores."""
        from stages.models.same_tokenizer import check_same_tokenizer

        if policy is None or GOLD_MODEL not in self._config.given_roles(Stage.PPO):
            return
        try:
            check_same_tokenizer(self._folder, policy.backend, role=GOLD_MODEL)
        except ConfigError:
            if self._config.ppo.needs_gold:
                raise
            note = "its tokenizer is not the policy's: it judges in `evaluate`, and not while PPO trains"
            self._notes.append(note)

    def _text(self) -> _Text:
        if (tokens := self._config.given.get("tokens")) is not None:
            return _text_of_tokens(tokens)
        settings = self._config.tokenize
        return self._own_text(
            chat_template=settings.chat_template,
            sequence_length=settings.sequence_length,
            only_last_turn=settings.trained_turns == "last",
        )

    def _own_text(self, *, chat_template: str, sequence_length: int, only_last_turn: bool | None = None) -> _Text:
        """What the model's own tokenizer makes of texts; its template is checked for training where that is asked."""
        from stages.models.given_tokenizer import given_tokenizer

        tokenizer = given_tokenizer(self._folder, chat_template=chat_template)
        if only_last_turn is not None:
            tokenizer.chat().check(only_last_turn=only_last_turn)
        return _Text(
            backend=tokenizer.backend,
            sequence_length=sequence_length,
            pad_id=tokenizer.pad_id,
            template=_template_in_words(tokenizer),
        )

    def _loaded(self, text: _Text, *, scores: bool) -> Any:
        """The model without numbers, checked as `load_causal_lm` and `load_reward_model` do."""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        from stages.models.build import check_complete, check_positions, check_score, has_no_score
        from stages.models.given_tokenizer import check_growth
        from stages.models.hollow import hollow_model

        kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        options = {"num_labels": 1, "pad_token_id": text.pad_id} if scores else {}
        hollow = hollow_model(kind, self._folder, with_weights=self._outline.has_headers, **options)
        new = {"score.weight"} if scores and has_no_score(self._folder) else set()
        check_complete(hollow.loading, self._folder, new=new)
        embeddings: Any = hollow.model.get_input_embeddings()
        check_growth(text.backend, rows=embeddings.weight.shape[0])
        check_positions(hollow.model, text.sequence_length)
        if scores:
            check_score(hollow.model)
        return hollow.model

    def _check_training(self, stage: Stage, text: _Text) -> None:
        from stages.models.attention import attend_within_documents
        from stages.models.lora import add_adapter
        from stages.train.engines.pipeline import check_stackable
        from stages.train.engines.tensor_parallel import check_cuttable
        from stages.train.engines.torch_engine import refuse_what_cannot_be_cut

        train, execution = self._config.stage_config(stage), self._config.stage_execution(stage)
        assert isinstance(train, TrainConfig)
        parts: dict[str, Any] = {}
        if not GRAPH[stage].scores and self._model.role == BASE_MODEL:
            parts["policy"] = self._loaded(text, scores=False)
        if GRAPH[stage].scores or learns_from_scores(GRAPH[stage]):  # its critic starts as the reward model
            parts["critic"] = self._loaded(text, scores=True)
        for model in parts.values():
            attend_within_documents(model)
            if isinstance(train, PostTrainConfig):
                add_adapter(model, train.lora, seed=train.seed)
        if execution.workers_per_copy == 1:
            return
        refuse_what_cannot_be_cut(parts, train, execution)
        for model in parts.values():
            if execution.tensor_parallel > 1:
                check_cuttable(model, execution.tensor_parallel)
            if execution.pipeline_parallel > 1:
                check_stackable(model, execution.pipeline_parallel)

    def _memory(self, shape: ModelConfig | None, parameters: int, rows: int) -> dict[Stage, float]:
        if shape is None:
            if self._trained_stages():
                self._notes.append("its memory is not estimated, because its layers are unlike those of a Llama")
            return {}
        return {
            stage: memory_bytes(stage, self._config, vocab_size=rows, model=shape, parameters=parameters)
            for stage in self._trained_stages()
        }

    def _compare(self, memory: dict[Stage, float]) -> None:
        """Warn where a stage needs more than this machine has: others of the cluster may have more."""
        for stage, needed in memory.items():
            execution = self._config.stage_execution(stage)
            has, what = _room(execution)
            if has is not None and needed > has:
                self._warnings.append(
                    f"{stage.value} needs about {byte_size(needed)} a worker for {self._model.role}="
                    f"{self._model.uri!r}, and {what} here has {byte_size(has)}. Unless its workers run on larger "
                    f"machines it will run out of memory: set {stage.value}.lora.rank, execution.{stage.value}."
                    f"gradient_checkpointing, a smaller execution.{stage.value}.micro_batch_size, or engine=fsdp with "
                    "more workers."
                )


def _text_of_tokens(ref: Any) -> _Text:
    """Of a re-evaluation, whose tokens are given."""
    from tokenizers import Tokenizer

    from stages.config.records import parse_object

    meta = parse_object(read_file(ref, "meta.json"), f"{ref.uri}/meta.json")
    backend = Tokenizer.from_str(read_file(ref, "tokenizer/tokenizer.json").decode())
    return _Text(backend, sequence_length=meta["sequence_length"], pad_id=meta["pad_id"], template="")


def _template_in_words(tokenizer: Any) -> str:
    from stages.data.tokens.tokenizer import PLAIN_TEMPLATE

    if tokenizer.chat_template.endswith(PLAIN_TEMPLATE):
        return "plain words as chat template"
    whose = "its own chat template" if tokenizer.template_origin else "the given chat template"
    how = "inferred from what it writes" if tokenizer.infer_spans else "marked in it"
    return f"{whose}, the assistant's turns {how}"


def _room(execution: ExecutionConfig) -> tuple[float | None, str]:
    """What a worker of this machine has at most, None where that cannot be told from here."""
    if execution.gpus_per_worker:
        import torch

        if not torch.cuda.is_available():
            return None, ""
        return float(torch.cuda.get_device_properties(0).total_memory), "a GPU"
    import psutil

    return psutil.virtual_memory().total / max(execution.num_workers, 1), "the share of each on a machine like this"


def shape_of(config: Any) -> ModelConfig | None:
    """A model's measures as those of a Llama or Mixtral; None where they are missing or make none."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    found = {
        "hidden_size": getattr(config, "hidden_size", None),
        "intermediate_size": (getattr(config, "moe_intermediate_size", None) if experts else None)
        or getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        "num_heads": getattr(config, "num_attention_heads", None),
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None),
        "tie_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "num_experts": experts,
    }
    if experts:
        found["num_experts_per_token"] = getattr(config, "num_experts_per_tok", 2)
    try:
        return ModelConfig.model_validate(found)
    except ValidationError:
        return None


if __name__ == "__main__":
    end(main(sys.argv[1:]))
