"""The bench: which models are measured on which suites, and who measures what.

A unit is one model on one suite, or on one shard of a long benchmark. Every unit is measured once and kept in the store
at once: an evaluation that was killed continues with the units that are missing, a model that was measured before is
not measured again, and the workers of one evaluation hand each other their results that way. Suites of other rooms plug
in at `_further_suites`.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from stages.config.closing import EvaluateConfig
from stages.config.errors import StageError
from stages.config.evaluation import CHAMPION_ROLE
from stages.config.graph import aligned_models
from stages.data.tokens.originals import published_tokenizer
from stages.data.tokens.packing import RowBudget
from stages.data.tokens.views import TokensArtifact
from stages.job.context import StageContext
from stages.job.devices import local_device
from stages.judge.benchmarks.facets import Facet
from stages.judge.benchmarks.suites import MadeSuites, grouped_suites
from stages.judge.builtin.language import Language, RowLosses
from stages.judge.builtin.replies import Margins, Pairs, PreferenceMargins, Preferences, Responses, RewardMargins
from stages.judge.builtin.sampled import Divergence, Length, Repetition, RewardScores, Sampler
from stages.judge.curated import find_texts, tokenize_settings
from stages.judge.failures import costs_its_suite, reason_of
from stages.judge.forward import Forward
from stages.judge.heldout import NOT_FINITE, Heldout
from stages.judge.judges.room import JudgeSource, OtherSubject, open_judges
from stages.judge.kept import Measurements
from stages.judge.prompts import refusal_prompt
from stages.judge.subjects import Subjects, scorer_role
from stages.judge.suite import Measurement, Subject, Suite

logger = logging.getLogger(__name__)

NO_RESULT = "no_result"
"""Reason for items of which a suite says nothing, against its promise."""
ANSWERS = "answers"
"""Group of the suites that read the sampled answers."""
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Unit:
    """One model on one suite."""

    role: str
    suite: Suite
    group: str
    """Units of one model and group share work, such as sampled answers, and stay on one worker."""
    is_published: bool = True
    """Whether its scores are a suite of the report; the others are what aggregates are made of."""
    judge: OtherSubject | None = None
    """The judge that is measured itself, in the place of the model of that role."""

    @property
    def key(self) -> tuple[str, str]:
        return self.role, self.suite.name


Measured = dict[tuple[str, str], Measurement]
"""By role and name of the suite."""


@dataclass
class Bench:
    """The items, the models and the units of one evaluation."""

    heldout: Heldout
    subjects: Subjects
    units: list[Unit]
    texts_missing: str = ""
    """Why the texts of the items are not known, if so."""
    counts: dict[str, int] = field(default_factory=lambda: {"measured": 0, "kept": 0})
    """Units that this process measured, and those that it found in the store, from before or by another worker."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Suites that cannot be made or measured, each with the reason."""
    failed: set[tuple[str, str]] = field(default_factory=set)
    """Units that raised an error when this process measured them."""
    has_benchmarks: bool = False
    """Whether there are suites that need no held-out data."""


def open_bench(context: StageContext) -> Bench:
    """Choose the items and list the units; no model is loaded yet."""
    config = context.config
    assert isinstance(config, EvaluateConfig)
    tokens, device = TokensArtifact(context.input_dir("tokens")), local_device()
    settings = tokenize_settings(context)
    tokenizer = published_tokenizer(tokens, settings)
    texts = find_texts(context, tokens, tokenizer, settings)
    heldout = Heldout(config, tokens, tokenizer, settings=settings, originals=texts.originals, texts=texts.documents)
    subjects = Subjects(context, tokens, tokenizer, device=device)
    budget = RowBudget(tokens.sequence_length, context.execution.micro_batch_size)
    forward = Forward(device, budget, beat=context.progress.watchdog.beat)
    samplers = _Samplers.of(config, heldout, forward)
    source = JudgeSource(context, forward)
    judges = open_judges(context, heldout, subjects, samplers.scored, forward, source)
    made = _further_suites(context, samplers.scored, source)
    further = [*made.suites, *((suite, ANSWERS) for suite in judges.of_answers)]
    # Before a judge judges, it is measured itself.
    units = [Unit(judge.role, suite, suite.name, judge=judge) for judge, suite in judges.of_themselves]
    units += _Units(heldout, subjects, forward, samplers, further).all()
    return Bench(
        heldout,
        subjects,
        units,
        texts.missing,
        left_out=judges.left_out | made.left_out,
        has_benchmarks=any(isinstance(suite, Facet) for suite, _ in made.suites),
    )


@dataclass(frozen=True)
class _Samplers:
    """Who asks the prompts: once at the temperature of the evaluation, and greedily what people are shown."""

    scored: Sampler
    shown: Sampler

    @staticmethod
    def of(config: EvaluateConfig, heldout: Heldout, forward: Forward) -> "_Samplers":
        def sampler(num_prompts: int, temperature: float) -> Sampler:
            return Sampler(
                heldout,
                heldout.prompts[:num_prompts],
                max_response_length=config.max_response_length,
                temperature=temperature,
                seed=config.seed,
                beat=forward.beat,
            )

        return _Samplers(sampler(len(heldout.prompts), config.temperature), sampler(config.num_samples, 0.0))


def _further_suites(context: StageContext, sampler: Sampler, source: JudgeSource) -> MadeSuites:
    """Suites of other rooms, which measure every language model, each with its group: suites that read the answers of
    `sampler` belong to `ANSWERS`, the others to a group of their own name. One line for each room."""
    assert isinstance(context.config, EvaluateConfig)
    judge = source.asked(refusal_prompt())
    return grouped_suites(context.config, context, sampler, sampled=ANSWERS, judge=judge)


@dataclass(frozen=True)
class _Units:
    """Lists what is measured of whom."""

    heldout: Heldout
    subjects: Subjects
    forward: Forward
    samplers: _Samplers
    further: Sequence[tuple[Suite, str]]

    def all(self) -> list[Unit]:
        margins = Margins(self.heldout, self.forward)
        found = []
        for role in self.subjects.roles:
            found += self._of_texts(role)
            found += self._of_start(role, margins)
            found += self._of_answers(role)
            found += [Unit(role, suite, group) for suite, group in self.further]
        if self.subjects.scorer_identity and self.heldout.pairs:
            found.append(Unit(scorer_role(), RewardMargins(self.heldout, self.forward), "scorer", is_published=False))
        return found

    def _of_texts(self, role: str) -> list[Unit]:
        found = []
        if len(self.heldout.row_numbers) and self.subjects.reads_run_tokens(role):
            found.append(Unit(role, RowLosses(self.heldout, self.forward), "rows", is_published=False))
        if self.heldout.documents:
            found.append(Unit(role, Language(self.heldout, self.forward), "language"))
        if self.heldout.conversations:
            found.append(Unit(role, Responses(self.heldout, self.forward), "responses"))
        if self.heldout.pairs:
            found.append(Unit(role, Pairs(self.heldout, self.forward), "pairs"))
        return found

    def _of_start(self, role: str, margins: Margins) -> list[Unit]:
        """What is relative to the model that an aligned one started from."""
        start = self.subjects.start
        if not start or role not in {spec.role for spec in aligned_models()}:
            return []
        identity, opened = self.subjects.identity(start), lambda: self.subjects.open(start)
        found = []
        if self.heldout.pairs:
            found.append(Unit(role, Preferences(self.heldout, margins, opened, identity), "preferences"))
            told = PreferenceMargins(self.heldout, margins, opened, identity)
            found.append(Unit(role, told, "preferences", is_published=False))
        if self.heldout.prompts:
            found.append(Unit(role, Divergence(self.samplers.scored, self.forward, opened, identity), ANSWERS))
        return found

    def _of_answers(self, role: str) -> list[Unit]:
        if not self.heldout.prompts:
            return []
        scored, shown = self.samplers.scored, self.samplers.shown
        found = [Unit(role, Length(scored), ANSWERS), Unit(role, Repetition(scored), ANSWERS)]
        told = [Unit(role, Length(shown, name="shown"), "shown", is_published=False)]
        if identity := self.subjects.scorer_identity:
            scorer = self.subjects.scorer
            found.append(Unit(role, RewardScores(scored, self.forward, scorer, identity), ANSWERS))
            judged = RewardScores(shown, self.forward, scorer, identity, name="shown_score")
            told.append(Unit(role, judged, "shown", is_published=False))
        return [*found, *told]


def measure_units(bench: Bench, context: StageContext, *, rank: int, world_size: int) -> Measured:
    """Measure this worker's share of the units; on rank 0 return all of them, those of the other workers included."""
    measurements = Measurements(context.store, context.check_lease, evaluation=context.fingerprint)
    measured: Measured = {}
    if rank:
        measurements.forget_done(rank)  # of an attempt before this one
    for unit in share(pieces(bench.units), rank=rank, world_size=world_size):
        _measure(unit, bench, measurements, measured)
        _report(context, bench, measured)
    if rank:
        measurements.write_done(rank)
    else:
        _collect(bench, context, measurements, measured, world_size=world_size)
    logger.info("rank %d measured %s", rank, bench.counts)
    wanted = {unit.key for unit in _wanted(bench)}
    found = {key: result for key, result in measured.items() if key in wanted}
    if rank == 0 and bench.failed and not found:
        raise StageError(
            f"no suite could be measured: {next(iter(bench.left_out.values()))}",
            advice="The errors of all suites are in the log.",
        )
    return found


def pieces(units: Sequence[Unit]) -> list[Unit]:
    """Put the shards of long suites in their place; the same shard of suites that share a pass is one group."""
    found = [piece for unit in units for piece in (_shards(unit) or [unit])]
    order = {group: place for place, group in enumerate(dict.fromkeys((piece.role, piece.group) for piece in found))}
    return sorted(found, key=lambda piece: order[piece.role, piece.group])


def _shards(unit: Unit) -> list[Unit]:
    shards = unit.suite.shards if isinstance(unit.suite, Facet) else ()
    return [
        replace(unit, suite=shard, group=f"{unit.group}/{number}", is_published=False)
        for number, shard in enumerate(shards)
    ]


def share(units: Sequence[Unit], *, rank: int, world_size: int) -> list[Unit]:
    """Return the units of one worker: groups stay together, and a model's groups mostly do."""
    groups = list(dict.fromkeys((unit.role, unit.group) for unit in units))
    mine = {group for place, group in enumerate(groups) if place * world_size // len(groups) == rank}
    return [unit for unit in units if (unit.role, unit.group) in mine]


def _wanted(bench: Bench) -> list[Unit]:
    """The units of models that can be measured: a champion may turn out to be unreadable."""
    return [unit for unit in bench.units if _is_known(unit, bench)]


def _is_known(unit: Unit, bench: Bench) -> bool:
    return unit.judge is not None or unit.role in {*bench.subjects.roles, scorer_role()}


def _measure(unit: Unit, bench: Bench, measurements: Measurements, measured: Measured) -> None:
    if not _is_known(unit, bench):
        return
    found = measurements.read(_identity(unit, bench), unit.suite)
    if found is not None:
        bench.counts["kept"] += 1
        measured[unit.key] = found
        return
    if shards := _shards(unit):
        _join(unit, shards, bench, measurements, measured)
        return
    opened = None if unit.judge else _opened(unit.role, bench.subjects)
    if opened is None and unit.judge is None:
        return
    try:
        subject = unit.judge.open() if unit.judge else opened
        assert subject is not None
        with torch.no_grad():
            found = _complete(unit.suite.measure(subject), unit)
    except Exception as error:
        if not costs_its_suite(error, of_champion=unit.role == CHAMPION_ROLE):
            raise
        logger.exception("suite %s could not be measured on %s", unit.suite.name, unit.role)
        bench.failed.add(unit.key)
        bench.left_out[_left_out(unit)] = reason_of(error)
        return
    measurements.write(subject.identity, unit.suite, found)
    bench.counts["measured"] += 1
    measured[unit.key] = found


def _join(unit: Unit, shards: list[Unit], bench: Bench, measurements: Measurements, measured: Measured) -> None:
    """Make the measurement of a long suite out of its shards, measuring those that nobody has measured."""
    for shard in shards:
        if shard.key not in {*measured, *bench.failed}:
            _measure(shard, bench, measurements, measured)
    parts = [measured[shard.key] for shard in shards if shard.key in measured]
    if len(parts) == len(shards):
        assert isinstance(unit.suite, Facet)
        measured[unit.key] = _complete(unit.suite.joined(parts), unit)
        measurements.write(_identity(unit, bench), unit.suite, measured[unit.key])
    elif _is_known(unit, bench):
        told = [bench.left_out.pop(_left_out(shard), "") for shard in shards]
        bench.failed.add(unit.key)
        bench.left_out[_left_out(unit)] = next(filter(None, told), "a shard could not be measured")


def _left_out(unit: Unit) -> str:
    return f"suite {unit.suite.name} of {unit.role}"


def _identity(unit: Unit, bench: Bench) -> str:
    subjects = bench.subjects
    if unit.judge:
        return unit.judge.identity
    return subjects.scorer_measured_as if unit.role == scorer_role() else subjects.identity(unit.role)


def _opened(role: str, subjects: Subjects) -> Subject | None:
    """Open a model; a champion that cannot be read is left out, because the run's own models must not fail for it."""
    if role == scorer_role():
        return subjects.scorer_as_subject()
    try:
        return subjects.open(role)
    except Exception as error:
        if role != CHAMPION_ROLE or not costs_its_suite(error, of_champion=True):
            raise
        logger.exception("the champion is not measured")
        subjects.forget(role, reason_of(error))
        return None


def _collect(
    bench: Bench, context: StageContext, measurements: Measurements, measured: Measured, *, world_size: int
) -> None:
    """Take what the other workers measure, and measure here what all of them leave: they may know fewer suites than
    this one, or other models. Ray ends all workers when one fails, and one that hangs is ended by its own watchdog, so
    waiting for them ends too."""
    others = range(1, world_size)
    while missing := [unit for unit in _wanted(bench) if unit.key not in {*measured, *bench.failed}]:
        # Before looking: what a worker has measured is there once it is done.
        are_done = all(measurements.is_done(rank) for rank in others)
        before = len(measured)
        for unit in missing:
            if _is_known(unit, bench) and (are_done or measurements.is_there(_identity(unit, bench), unit.suite)):
                _measure(unit, bench, measurements, measured)
                _report(context, bench, measured)
        if not are_done and len(measured) == before:
            context.progress.watchdog.beat()
            time.sleep(_LOOK_SECONDS)


def _complete(found: Measurement, unit: Unit) -> Measurement:
    """Hold a suite to its promise: a finite score or a reason for every item."""
    finite = [score for score in found.scores if math.isfinite(score.value)]
    found.skipped[NOT_FINITE] += len(found.scores) - len(finite)
    told = len(finite) + found.skipped.total()
    if told > len(unit.suite) or len({score.item for score in finite}) != len(finite):
        raise AssertionError(f"suite {unit.suite.name} gave {told} results for {len(unit.suite)} items")
    found.skipped[NO_RESULT] += len(unit.suite) - told
    return Measurement(finite, +found.skipped, found.is_final)  # without reasons that no item has


def _report(context: StageContext, bench: Bench, measured: Measured) -> None:
    wanted = pieces(_wanted(bench))
    context.progress(sum(piece.key in measured for piece in wanted), len(wanted), "measurement")
