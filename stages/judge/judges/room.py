"""The judges of an evaluation: which there are, how they are opened, and which suites they make.

A gold scorer is a reward model that the run trained for judging only, or was given; a rule needs no model; a judge that
compares is a given model in this process, or an endpoint. Each is opened when it is first needed, because measurements
that are kept need none of them. A judge that cannot be used is told and costs its suite, never the evaluation.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from stages.artifacts.manifests import read_manifest
from stages.config.closing import EvaluateConfig
from stages.config.errors import ConfigError
from stages.config.graph import GOLD_MODEL, GRAPH, JUDGE, Stage
from stages.config.judging import JudgeConfig
from stages.config.principles import Area
from stages.data.tokens.reasons import bits_of
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.job.context import StageContext
from stages.judge.builtin.sampled import RewardScores, Sampler
from stages.judge.failures import costs_its_suite, reason_of
from stages.judge.forward import Forward
from stages.judge.heldout import Heldout, PairItem
from stages.judge.judges.gold import GOLD, ForeignScorer, ForeignScores, GoldAgreement
from stages.judge.judges.pairwise_suite import JudgeAgreement, JudgeWins
from stages.judge.judges.rules import RULE, RuleScores, ready_rule
from stages.judge.pairwise import AWAY, UNUSABLE, Answer, Judge, JudgeAwayError, Question
from stages.judge.subjects import Subjects, end_id, writes_nothing
from stages.judge.suite import Subject, Suite
from stages.models.build import (
    load_scorer,
    load_scorer_with_own_tokenizer,
    load_with_own_tokenizer,
    positions_of,
)
from stages.models.given_tokenizer import given_tokenizer
from stages.models.precision import compute_dtype
from stages.models.same_tokenizer import check_one_score

if TYPE_CHECKING:
    from stages.judge.endpoint import EndpointJudge

logger = logging.getLogger(__name__)

_GOLD_ROLE = GRAPH[Stage.GOLD].role
_UNLIMITED = 1 << 20


@dataclass(frozen=True)
class OtherSubject:
    """A model that is measured and writes no answers, such as a scorer: its identity is known before it is opened."""

    role: str
    identity: str
    open: Callable[[], Subject]


@dataclass(frozen=True)
class Judges:
    """What the judges of an evaluation measure."""

    of_answers: Sequence[Suite]
    """Suites over the sampled answers of every language model."""
    of_themselves: Sequence[tuple[OtherSubject, Suite]]
    """How well the judges agree with held-out pairs."""
    left_out: dict[str, str]
    """Suites that cannot be made, each with the reason."""


def open_judges(
    context: StageContext,
    heldout: Heldout,
    subjects: Subjects,
    sampler: Sampler,
    forward: Forward,
    source: "JudgeSource",
) -> Judges:
    """Find the judges that the run has; no model is loaded yet."""
    config = context.config
    assert isinstance(config, EvaluateConfig)
    of_answers: list[Suite] = []
    of_themselves: list[tuple[OtherSubject, Suite]] = []
    left_out: dict[str, str] = {}
    if config.gold.rule:
        try:
            of_answers.append(RuleScores(sampler, ready_rule(config.gold.rule)))
        except ConfigError as error:  # known here alone, where Ray's processes run, and after all was trained
            left_out[f"suite {RULE}"] = f"{error.message} {error.advice}"
    gold = None
    if (content := _gold_content(context)) and content == subjects.scorer_identity:
        left_out[f"suite {GOLD}"] = "the gold scorer is the reward model itself, which models were trained against"
    elif content:
        try:
            gold = _Gold(context.model_dir(_GOLD_ROLE, GOLD_MODEL), content, heldout, forward)
        except Exception as error:
            if not costs_its_suite(error):
                raise
            logger.exception("the gold scorer is left out")
            left_out[f"suite {GOLD}"] = reason_of(error)
    if gold:
        of_answers.append(gold.scores(sampler))
        if pairs := _pairs_of_gold(context, heldout):
            of_themselves.append((gold.as_subject(), gold.agreement(pairs)))
    judge, start = source.asked(), subjects.start
    if judge is not None and not start:
        left_out[f"suite {JUDGE}"] = "no model that an aligned one started from is measured, so there is no opponent"
    elif judge is not None:
        of_answers.append(
            JudgeWins(
                sampler,
                judge,
                max_items=config.judge.max_items,
                opponent=lambda: subjects.open(start),
                opponent_identity=subjects.identity(start),
            )
        )
        if heldout.pairs:
            nothing = Subject(
                JUDGE, judge.identity, nn.Identity(), heldout.tokenizer, forward.device, 0, writes_nothing
            )
            agreement = JudgeAgreement(heldout, judge, max_pairs=config.judge.max_pairs)
            of_themselves.append((OtherSubject(JUDGE, judge.identity, lambda: nothing), agreement))
    return Judges(of_answers if heldout.prompts else [], of_themselves, left_out)


def _gold_content(context: StageContext) -> str:
    """Digest of the gold scorer; empty without one."""
    try:
        return context.content_of(_GOLD_ROLE, GOLD_MODEL)
    except KeyError:
        return ""


def _pairs_of_gold(context: StageContext, heldout: Heldout) -> list[PairItem]:
    """The held-out pairs that the gold scorer can be asked about: where it learnt from those of some reasons alone,
    the pairs of these reasons."""
    ref = next((context.inputs[role] for role in (_GOLD_ROLE, GOLD_MODEL) if role in context.inputs), None)
    learnt = [Area(name) for name in read_manifest(ref).config.get("reasons", ())] if ref else []
    return [pair for pair in heldout.pairs if not learnt or pair.reasons & bits_of(learnt)]


class _Gold:
    """The gold scorer, in the run's tokens where it has its tokenizer, else in its own."""

    def __init__(self, folder: Path, content: str, heldout: Heldout, forward: Forward) -> None:
        check_one_score(folder, role=_GOLD_ROLE)
        self._folder, self._content, self._heldout, self._forward = folder, content, heldout, forward
        own = given_tokenizer(folder)
        shares = own.digest == heldout.tokenizer.digest
        self._own: LoadedTokenizer | None = None if shares else own

    @property
    def _identity(self) -> str:
        told = [self._content, (self._own or self._heldout.tokenizer).digest, str(compute_dtype(self._forward.device))]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def scores(self, sampler: Sampler) -> Suite:
        if self._own is None:
            return RewardScores(sampler, self._forward, lambda: self._model, self._identity, name=GOLD)
        return ForeignScores(sampler, self._forward, lambda: self._foreign, self._identity)

    def agreement(self, pairs: Sequence[PairItem]) -> Suite:
        return GoldAgreement(self._heldout, pairs, self._forward, (lambda: self._foreign) if self._own else None)

    def as_subject(self) -> OtherSubject:
        tokenizer = self._own or self._heldout.tokenizer

        def opened() -> Subject:
            length = positions_of(self._model) or _UNLIMITED  # type: ignore[arg-type]
            device = self._forward.device
            return Subject(_GOLD_ROLE, self._identity, self._model, tokenizer, device, length, writes_nothing)

        return OtherSubject(_GOLD_ROLE, self._identity, opened)

    @cached_property
    def _model(self) -> nn.Module:
        if self._own is None:
            model = load_scorer(self._folder, self._heldout.tokens)
        else:
            model = load_scorer_with_own_tokenizer(self._folder, self._own)
        return _placed(model, self._forward)

    @cached_property
    def _foreign(self) -> ForeignScorer:
        assert self._own is not None
        length = positions_of(self._model) or _UNLIMITED  # type: ignore[arg-type]
        return ForeignScorer(self._model, self._own, end_id(self._own), length)


class JudgeSource:
    """Opens the run's judge with a prompt; what compares answers and what tells refusals share one model."""

    def __init__(self, context: StageContext, forward: Forward) -> None:
        assert isinstance(context.config, EvaluateConfig)
        self._context, self._config, self._forward = context, context.config, forward

    def asked(self, prompt: str = "") -> "LazyJudge | None":
        """The judge, with its own prompt unless another is given; None where the run has none."""
        changes = {"prompt": prompt} if prompt else {}
        config = self._config.judge.model_copy(update=changes)
        if config.endpoint:
            from stages.judge.endpoint import EndpointJudge, identity_of

            return LazyJudge(identity_of(config), lambda: self._reached(EndpointJudge, config))
        if self._context.has_given(JUDGE):
            from stages.judge.in_process import identity_of

            content = self._context.content_of(JUDGE)
            dtype = compute_dtype(self._forward.device)
            return LazyJudge(identity_of(config, content, dtype), lambda: self._loaded(config, content))
        return None

    def _reached(self, kind: "type[EndpointJudge]", config: JudgeConfig) -> Judge:
        refusals = any(benchmark.judge for benchmark in self._config.parsed_benchmarks)
        workers = max(1, self._context.execution.num_workers)
        judge = kind(_share_of_budget(config, workers * (1 + refusals)), beat=self._forward.beat)
        judge.require_reachable()
        return judge

    def _loaded(self, config: JudgeConfig, content: str) -> Judge:
        from stages.judge.in_process import InProcessJudge

        tokenizer, model = self._model
        return InProcessJudge(
            config,
            model,
            tokenizer,
            identity=content,
            device=self._forward.device,
            context_length=positions_of(model) or _UNLIMITED,  # type: ignore[arg-type]
            max_rows=self._context.execution.micro_batch_size,
            eos_id=end_id(tokenizer),
            beat=self._forward.beat,
        )

    @cached_property
    def _model(self) -> tuple[LoadedTokenizer, nn.Module]:
        folder = self._context.given_dir(JUDGE)
        tokenizer = given_tokenizer(folder)
        return tokenizer, _placed(load_with_own_tokenizer(folder, tokenizer), self._forward)


def _placed(model: nn.Module, forward: Forward) -> nn.Module:
    return model.eval().to(forward.device)


def _share_of_budget(config: JudgeConfig, workers: int) -> JudgeConfig:
    """Every worker asks for itself; together they keep to the limits."""
    changes = {name: max(1, getattr(config, name) // workers) for name in ("max_requests", "concurrency")}
    return config.model_copy(update=changes)


class LazyJudge:
    """A judge that is opened with its first question; one that cannot be used says so instead of failing."""

    def __init__(self, identity: str, open_judge: Callable[[], Judge]) -> None:
        self.identity, self._open_judge = identity, open_judge
        self._judge: Judge | None = None
        self._reason = ""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        if self._judge is None and not self._reason:
            try:
                self._judge = self._open_judge()
            except JudgeAwayError as error:
                self._reason = AWAY
                logger.warning("no model judges: %s", error)
            except Exception as error:
                if not costs_its_suite(error):
                    raise
                self._reason = UNUSABLE
                told = reason_of(error)
                logger.warning("no model judges: %s", told, exc_info=not isinstance(error, ConfigError))
        return [self._reason] * len(questions) if self._judge is None else self._judge.ask(questions)
