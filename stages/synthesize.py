"""`synthesize`: instruction data that a model writes, from seed tasks, prompts or texts, for `curate` to read.

Self-instruct is after Wang et al. 2022, https://arxiv.org/abs/2212.10560. Every text that the generator has written is
kept in the store before the next one is asked for, so an attempt that was killed is continued without asking anything
twice, and makes the same rows.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.config.errors import DataError, StageError
from stages.config.graph import BASE_MODEL, GENERATOR, GRAPH, INSTRUCTIONS, REWARD_MODEL, Stage
from stages.config.scorers import RewardModelScorer
from stages.config.synthesis import FirstScorer, Synthesis, SynthesizeConfig
from stages.data.pairs.turns import Message, Unusable
from stages.data.synthesis.account import Account
from stages.data.synthesis.filters import Rules
from stages.data.synthesis.language import language_check
from stages.data.synthesis.sources import read_passages, read_prompts, read_seed_tasks
from stages.data.synthesis.work import ACCEPTED, Asked, Draft, Score, Work, Written, rows
from stages.data.tokens.encoding import Chat
from stages.data.tokens.packing import RowBudget
from stages.job.context import StageContext, StageOutcome, naming
from stages.job.devices import local_device
from stages.job.generators import opened_generator
from stages.job.workers import launch
from stages.judge.benchmarks.refusals import declines
from stages.judge.forward import Forward
from stages.judge.heldout import Skipped
from stages.judge.judges.gold import ForeignScorer
from stages.judge.subjects import end_id
from stages.models.build import load_scorer_with_own_tokenizer, positions_of
from stages.models.endpoint.records import AWAY, BUDGET, ChatRequest, Outcome, Unanswered
from stages.models.generators import Generator
from stages.models.given_tokenizer import given_tokenizer
from stages.models.same_tokenizer import check_one_score
from stages.reporting.synthesis import synthesis_page
from stages.rules.ready import Row, ready_rule

_UNLIMITED = 1 << 20
_MORE_BUDGET = "Raise the budget: what was answered is kept."
_OTHER_GENERATOR = (
    "Give a more capable generator or other sources, or loosen the filters; docs/SYNTHESIS.md names them."
)
_ROWS, _DRAFTS = "instructions.jsonl", "transcript.jsonl"


def run(context: StageContext) -> StageOutcome:
    return launch(context, synthesize)


def synthesize(context: StageContext) -> StageOutcome:
    """Write instructions.jsonl, everything that was made and dropped as transcript.jsonl, and a page with samples."""
    config = context.config
    assert isinstance(config, SynthesizeConfig)
    rules = Rules(config, language_check(config.language, config.min_language_score), declines)
    score = _scorer(context, config)
    context.progress(0, config.num_rows, "row", phase="load")

    def report(done: int, total: int, phase: str) -> None:
        context.check_lease()
        context.progress(done, total, phase.removesuffix("s"), phase=phase)

    with opened_generator(
        context,
        config.generator,
        field="synthesize.generator",
        roles=(GENERATOR, BASE_MODEL),
        seed=config.seed,
        beat=context.progress.watchdog.beat,
    ) as generator:
        work = Work(config, rules, _writer(generator), score, report)
        drafts = _worked(work)
        spent, name, identity = generator.account(), generator.name, generator.identity
    made = list(rows(drafts, method=config.method, generator=name, identity=identity))
    _require_rows(made, work.account)
    _write_lines(context, _ROWS, made)
    _write_lines(context, _DRAFTS, map(_told, drafts))
    published = {INSTRUCTIONS: len(made)}
    ledger = {
        **work.account.to_dict(),
        "published": published,
        "method": config.method.value,
        "generator": name,
        "asked": spent,
    }
    _write_page(drafts, work.account, ledger, context)
    return StageOutcome(metrics=_metrics(work.account, spent), ledger=ledger)


def _worked(work: Work) -> list[Draft]:
    config, step = work.config, work.account.sources
    match config.method:
        case Synthesis.SELF_INSTRUCT:
            return work.self_instruct(read_seed_tasks(config, step))
        case Synthesis.DISTILLATION:
            return work.distillation(read_prompts(config, step))
        case Synthesis.GROUNDED:
            return work.grounded(read_passages(config, step))
        case Synthesis.OFF:
            raise AssertionError("a run with synthesis=off does not select the stage")


def _writer(generator: Generator) -> Any:
    """The generator as the work asks it; raises StageError when an endpoint is away, so that the task is retried and
    nothing counts as dropped."""

    def write(asked: Sequence[Asked]) -> list[Written]:
        outcomes = generator.ask([
            ChatRequest(tuple(one.turns), one.max_tokens, one.temperature, one.number) for one in asked
        ])  # fmt: skip
        away = next((one for one in outcomes if isinstance(one, Unanswered) and one.reason == AWAY), None)
        if away is not None:
            raise StageError(
                f"synthesize: {generator.name} is away: {away.told or 'it did not answer'}",
                advice="What it answered is kept. The task is retried; see that the endpoint runs.",
            )
        return [_written(outcome) for outcome in outcomes]

    return write


def _written(outcome: Outcome) -> Written:
    if isinstance(outcome, Unanswered):
        return Written(reason=outcome.reason)
    return Written(outcome.text or "", is_cut=outcome.is_cut)


def _scorer(context: StageContext, config: SynthesizeConfig) -> Score | None:
    if isinstance(config.scorer, FirstScorer):
        return None
    if isinstance(config.scorer, RewardModelScorer):
        return _reward_scorer(context)
    rule = ready_rule(config.scorer, field="synthesize.scorer")

    def by_rule(pairs: Sequence[tuple[Sequence[Message], str]]) -> list[float | str]:
        values = rule.values([response for _, response in pairs], [Row(turns[-1]["content"]) for turns, _ in pairs])
        return [f"rule_{value.failed}" if value.failed else value.value for value in values]

    return by_rule


def _reward_scorer(context: StageContext) -> Score:
    """The run's reward model, which reads prompts and responses as text, by its own chat template."""
    folder, device = context.given_dir(REWARD_MODEL), local_device()
    with naming(REWARD_MODEL):
        check_one_score(folder, role=REWARD_MODEL)
        tokenizer = given_tokenizer(folder)
        model: Any = load_scorer_with_own_tokenizer(folder, tokenizer)
    model.eval().to(device)
    length = positions_of(model) or _UNLIMITED
    reader = ForeignScorer(model, tokenizer, end_id(tokenizer), length)
    forward = Forward(device, RowBudget(1024, context.execution.micro_batch_size), context.progress.watchdog.beat)

    def by_model(pairs: Sequence[tuple[Sequence[Message], str]]) -> list[float | str]:
        found: list[float | str] = []
        sequences = []
        for messages, response in pairs:
            try:
                chat = Chat([*messages, {"role": "assistant", "content": response}], [])
                sequences.append(reader.encoded(chat, ended=True))
                found.append(0.0)
            except (Skipped, Unusable) as error:
                found.append(f"scorer_{error}")
        values = iter(forward.scores(model, sequences, pad_id=tokenizer.pad_id).tolist())
        return [one if isinstance(one, str) else float(next(values)) for one in found]

    return by_model


def _require_rows(made: Sequence[Any], account: Account) -> None:
    """Raise DataError when nothing is left, because the run could not go on with it."""
    if not made:
        dropped = {name: counted["dropped"] for name, counted in account.to_dict().items() if counted["dropped"]}
        spent = any(step.dropped[BUDGET] for step in account.steps().values())
        raise DataError(
            f"synthesize made no row; dropped: {dropped}",
            advice=_MORE_BUDGET if spent else _OTHER_GENERATOR,
        )


def _metrics(account: Account, spent: Mapping[str, Any]) -> dict[str, float]:
    asked = account.rows.entered
    found = {
        "synthesize/rows": float(account.rows.kept),
        "synthesize/accepted_share": account.rows.kept / asked if asked else 0.0,
        "synthesize/requests": float(spent["requests"]),
        "synthesize/prompt_tokens": float(spent["prompt_tokens"]),
        "synthesize/answer_tokens": float(spent["answer_tokens"]),
    }
    if account.instructions.entered:
        found["synthesize/instructions_accepted_share"] = account.instructions.kept / account.instructions.entered
    if "cost" in spent:
        found["synthesize/cost"] = float(spent["cost"])
    return found


def _told(draft: Draft) -> dict[str, Any]:
    return {
        "outcome": draft.outcome,
        "messages": list(draft.messages),
        "responses": [
            {"text": one.text, "outcome": one.outcome} | ({} if one.score is None else {"score": one.score})
            for one in draft.candidates
        ],
        "provenance": draft.provenance,
    }


def _write_lines(context: StageContext, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
    with (context.output_dir / name).open("w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_page(drafts: Sequence[Draft], account: Account, ledger: Mapping[str, Any], context: StageContext) -> None:
    path = context.output_dir / GRAPH[Stage.SYNTHESIZE].page
    page = synthesis_page(drafts, account, ledger, run_name=context.run.name, accepted=ACCEPTED)
    path.write_text(page, encoding="utf-8")
    context.tracker.log_artifact(path, path.name, parent=True)
