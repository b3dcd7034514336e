"""`constitution`: responses to given prompts, criticised, revised and compared by principles (Constitutional AI).

Bai et al. 2022, https://arxiv.org/abs/2212.08073: the supervised part gives revised conversations, the part with AI
feedback gives preference pairs. Every text that a model has written is kept in the store before the next one is asked
for, so an attempt that was killed is continued without asking anything twice.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from stages.config.constitution import ConstitutionConfig
from stages.config.errors import DataError, StageError
from stages.config.graph import BASE_MODEL, CRITIC, GRAPH, INSTRUCTIONS, PREFERENCES, Stage
from stages.config.principles import Constitution
from stages.data.constitution.account import ledger, metrics
from stages.data.constitution.asking import comparison_messages
from stages.data.constitution.principles import read_constitution
from stages.data.constitution.prompts import Prompt, PromptsAccount, read_prompts
from stages.data.constitution.rows import instructions, preferences
from stages.data.constitution.work import FIRST, SECOND, Asked, Found, Match, Work, Worked, Written
from stages.data.sources.records import stable_hash
from stages.job.context import StageContext, StageOutcome
from stages.job.generators import opened_generator
from stages.job.workers import launch
from stages.judge import pairwise
from stages.judge.benchmarks.refusals import declines
from stages.judge.pairwise import CUT, UNCLEAR, Answer, Question, read_verdict, verdicts
from stages.models.endpoint.records import AWAY, ChatRequest, Outcome, Unanswered
from stages.models.generators import Generator
from stages.reporting.constitution import constitution_page

_SHARD = 16
"""Prompts that are worked through together; models of this process compute them in batches."""
_VERDICT_TOKENS = 8
DISAGREEMENT = "orders_disagree"


def run(context: StageContext) -> StageOutcome:
    return launch(context, apply_constitution)


def apply_constitution(context: StageContext) -> StageOutcome:
    """Write what the run asked for of instructions.jsonl and preferences.jsonl, all texts as transcript.jsonl, and a
    page with some of them."""
    config = context.config
    assert isinstance(config, ConstitutionConfig)
    constitution = read_constitution(config.principles)
    account = PromptsAccount()
    prompts = read_prompts(config, account)
    require_principles(constitution, prompts)
    context.progress(0, len(prompts), "prompt", phase="load")
    with models_of(context, config) as (responder, critic):
        work = Work(
            config,
            constitution,
            GeneratorWriter(responder, seed=config.seed),
            GeneratorWriter(critic, seed=config.seed),
            PrincipleComparer(critic, seed=config.seed),
            declines,
        )
        worked = list(_worked(work, prompts, context))
        names = {"responder": responder.name, "critic": critic.name}
        spent = {"critic": critic.account()}
        if responder is not critic:
            spent["responder"] = responder.account()
    published = publish(worked, config, context)
    counted = ledger(worked, account.to_dict(len(prompts)), published)
    counted |= {"file": {"name": constitution.name, "version": constitution.version}, "models": names}
    counted |= {"asked": spent}
    found = metrics(worked, counted)
    _write_page(worked, constitution, counted, context)
    return StageOutcome(metrics=found, ledger=counted)


def _worked(work: Work, prompts: Sequence[Prompt], context: StageContext) -> Iterator[Worked]:
    for start in range(0, len(prompts), _SHARD):
        part = prompts[start : start + _SHARD]
        yield from work.on(part)
        context.progress(start + len(part), len(prompts), "prompt", phase="work")


def require_principles(constitution: Constitution, prompts: Sequence[Prompt]) -> None:
    """Raise DataError where no principle applies to a prompt."""
    for areas in {prompt.areas for prompt in prompts}:
        if not constitution.of(areas):
            names = " or ".join(sorted(area.value for area in areas))
            source = next(prompt.source for prompt in prompts if prompt.areas == areas)
            raise DataError(
                f"principles: {constitution.name!r} has no principle of the area {names}, which the prompts of "
                f"{source!r} ask for",
                advice="Add one to the file, or change #area= behind the source.",
            )


@contextmanager
def models_of(context: StageContext, config: ConstitutionConfig) -> Iterator[tuple[Generator, Generator]]:
    """Open what responds and what criticises; one model where both are the same."""
    beat = context.progress.watchdog.beat
    with ExitStack() as stack:

        def opened(*roles: str, endpoint: bool) -> Generator:
            settings = config.critic if endpoint else type(config.critic)()
            return stack.enter_context(
                opened_generator(
                    context, settings, field="constitution.critic", roles=roles, seed=config.seed, beat=beat
                )
            )

        by_endpoint, has_critic = bool(config.critic.endpoint), context.has_given(CRITIC)
        critic = opened(CRITIC, BASE_MODEL, endpoint=by_endpoint)
        is_same = not context.has_given(BASE_MODEL) or not (by_endpoint or has_critic)
        yield (critic if is_same else opened(BASE_MODEL, endpoint=False)), critic


class GeneratorWriter:
    """A generator as the work asks it."""

    def __init__(self, generator: Generator, *, seed: int) -> None:
        self._generator, self._seed = generator, seed

    def write(self, asked: Sequence[Asked]) -> list[Written]:
        requests = [_request(one, self._seed) for one in asked]
        return [_written(outcome) for outcome in _asked(self._generator, requests)]


class PrincipleComparer:
    """Compares by principles, each pair in both orders."""

    def __init__(self, generator: Generator, *, seed: int) -> None:
        self._generator, self._seed = generator, seed

    def compare(self, matches: Sequence[Match]) -> list[Found]:
        judge = _PrincipleJudge(self._generator, matches, seed=self._seed)
        found = verdicts(
            judge, [pairwise.Match(str(place), one.first, one.second) for place, one in enumerate(matches)]
        )
        return [
            Found(
                verdict.reason if verdict.value is None else {1.0: FIRST, 0.0: SECOND}.get(verdict.value, DISAGREEMENT),
                verdict.placed_first,
                verdict.asked,
            )
            for verdict in found
        ]


class _PrincipleJudge:
    """Asks by the principle of each match; the question's prompt is the match's place."""

    def __init__(self, generator: Generator, matches: Sequence[Match], *, seed: int) -> None:
        self._generator, self._matches, self._seed = generator, matches, seed

    @property
    def identity(self) -> str:
        return self._generator.identity

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        requests = []
        for question in questions:
            match = self._matches[int(question.prompt)]
            messages = comparison_messages(match.question, question.first, question.second, match.principle)
            requests.append(ChatRequest(tuple(messages), _VERDICT_TOKENS, number=self._seed))
        return [_verdict(outcome) for outcome in _asked(self._generator, requests)]


def _request(asked: Asked, seed: int) -> ChatRequest:
    """Random numbers follow from the messages and this number, so not from what else is asked."""
    number = stable_hash(seed, asked.step) % 2**31
    messages = tuple({"role": turn["role"], "content": turn["content"]} for turn in asked.messages)
    return ChatRequest(messages, asked.max_tokens, asked.temperature, number=number)


def _asked(generator: Generator, requests: Sequence[ChatRequest]) -> list[Outcome]:
    """Ask; raises StageError when an endpoint is away, so that the task is retried and nothing counts as dropped."""
    outcomes = generator.ask(requests) if requests else []
    away = next((one for one in outcomes if isinstance(one, Unanswered) and one.reason == AWAY), None)
    if away is not None:
        raise StageError(
            f"constitution: {generator.name} is away: {away.told or 'it did not answer'}",
            advice="What it answered is kept. The task is retried; see that the endpoint runs.",
        )
    return outcomes


def _written(outcome: Outcome) -> Written:
    if isinstance(outcome, Unanswered):
        return Written("", reason=outcome.reason)
    return Written(outcome.text or "", ended=not outcome.is_cut)


def _verdict(outcome: Outcome) -> Answer:
    if isinstance(outcome, Unanswered):
        return outcome.reason
    return read_verdict(outcome.text or "") or (CUT if outcome.is_cut else UNCLEAR)


def publish(worked: Sequence[Worked], config: ConstitutionConfig, context: StageContext) -> dict[str, int]:
    """Write the rows; raises DataError when nothing is left, because the run could not go on with it."""
    made: dict[str, list[dict[str, Any]]] = {}
    if config.makes_revisions:
        made[INSTRUCTIONS] = list(instructions(worked))
    if config.makes_pairs:
        made[PREFERENCES] = list(preferences(worked))
    if empty := [name for name, rows in made.items() if not rows]:
        outcomes = ledger(worked, {"kept": len(worked)}, {})
        raise DataError(
            f"constitution made no {empty[0]} of {len(worked)} prompts; responses: {outcomes['responses']['dropped']}, "
            f"revisions: {outcomes['rounds']['dropped']}, comparisons: {outcomes['comparisons']['dropped']}",
            advice="Give more prompts or a more capable critic, or loosen constitution.max_similarity and max_copied.",
        )
    for name, rows in made.items():
        _write_lines(context, f"{name}.jsonl", rows)
    _write_lines(context, "transcript.jsonl", (one.to_dict() for one in worked))
    counts = {name: len(rows) for name, rows in made.items()}
    for row in made.get(PREFERENCES, ()):
        counts[row["made"]] = counts.get(row["made"], 0) + 1
    return counts


def _write_lines(context: StageContext, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    with (context.output_dir / name).open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_page(
    worked: Sequence[Worked], constitution: Constitution, counted: dict[str, Any], context: StageContext
) -> None:
    path = context.output_dir / GRAPH[Stage.CONSTITUTION].page
    path.write_text(constitution_page(worked, constitution, counted, run_name=context.run.name), encoding="utf-8")
    context.tracker.log_artifact(path, path.name, parent=True)
