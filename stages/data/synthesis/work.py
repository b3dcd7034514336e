"""The three methods: from seed tasks, prompts or passages to rows. What writes and what scores is handed in.

A method is a function of its sources, its settings and the texts that it is given: it asks in a fixed order and draws
by the seed, so an attempt that is answered from what an earlier one has kept comes to the same rows.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stages.config.synthesis import Synthesis, SynthesizeConfig
from stages.data.pairs.turns import Message
from stages.data.synthesis import asking
from stages.data.synthesis.account import Account
from stages.data.synthesis.asking import Task, Turns
from stages.data.synthesis.filters import Pool, Rules, support
from stages.data.synthesis.sources import Passage, Prompt

ACCEPTED, BUDGET = "accepted", "budget_spent"
_SHARD = 16
"""Prompts that are worked on together."""
_INPUT_EXAMPLES = 4
"""Seed tasks that show what an input is, half of them without one."""
_SEEDS_APART = 1 << 20
"""Numbers of requests of one seed."""


@dataclass(frozen=True)
class Asked:
    """One question to the generator."""

    turns: Sequence[Message]
    max_tokens: int
    temperature: float
    number: int

    @property
    def digest(self) -> str:
        """Of what was asked, for provenance."""
        told = [[dict(turn) for turn in self.turns], self.max_tokens, self.temperature, self.number]
        return hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Written:
    """What came of it."""

    text: str = ""
    is_cut: bool = False
    reason: str = ""
    """Why there is no text."""


Write = Callable[[Sequence[Asked]], list[Written]]
Score = Callable[[Sequence[tuple[Sequence[Message], str]]], list[float | str]]
"""From prompts and their responses to a value, or the reason why there is none."""
Report = Callable[[int, int, str], None]
"""Done, total, and what is being made."""


@dataclass(frozen=True)
class Candidate:
    """One response, and what came of it: `accepted` or a reason."""

    text: str
    outcome: str
    prompt_digest: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Draft:
    """A prompt on its way to a row."""

    messages: tuple[Message, ...]
    provenance: dict[str, Any]
    candidates: tuple[Candidate, ...] = ()
    chosen: Candidate | None = None
    outcome: str = ""
    """`accepted`, or why there is no row."""


@dataclass
class Work:
    """One run of the stage."""

    config: SynthesizeConfig
    rules: Rules
    write: Write
    score: Score | None
    report: Report
    account: Account = field(default_factory=Account)

    def self_instruct(self, seeds: Sequence[Task]) -> list[Draft]:
        """Grow the pool of instructions round by round, then give each an input and a response."""
        tasks = self._with_inputs(self._new_tasks(seeds), seeds)
        return self._respond([
            Draft(({"role": "user", "content": task.prompt},), {**provenance, "input": bool(task.input)})
            for task, provenance in tasks
        ])  # fmt: skip

    def distillation(self, prompts: Sequence[Prompt]) -> list[Draft]:
        """Answer each prompt."""
        return self._respond([
            Draft(prompt.messages, {"row": prompt.id, "source": prompt.source}) for prompt in prompts
        ])  # fmt: skip

    def grounded(self, passages: Sequence[Passage]) -> list[Draft]:
        """Ask about each passage, one question after another, so that the later ones see the earlier ones."""
        config, drafts = self.config, list[Draft]()
        pools = [Pool(config.max_similarity) for _ in passages]
        earlier: list[list[str]] = [[] for _ in passages]
        total = min(config.num_rows, len(passages) * config.questions_per_text)
        left = total
        for turn in range(config.questions_per_text):
            for places in _parts(range(len(passages))):
                places = places[:left]
                left -= len(places)
                asked = [
                    self._asked(
                        asking.ask_about(passages[place].text, earlier[place]),
                        config.max_response_length,
                        config.response_temperature,
                        turn,
                    )
                    for place in places
                ]
                for place, one, written in zip(places, asked, self._written(asked), strict=True):
                    draft = self._question(passages[place], one, written, pools[place])
                    drafts.append(draft)
                    if draft.outcome == ACCEPTED:
                        earlier[place].append(draft.provenance["question"])
                self.report(total - left, total, "questions")
        return drafts

    def _new_tasks(self, seeds: Sequence[Task]) -> list[tuple[Task, dict[str, Any]]]:
        config, step = self.config, self.account.instructions
        pool, made = Pool(config.max_similarity), list[tuple[Task, dict[str, Any]]]()
        for seed in seeds:
            pool.add(seed.instruction)
        for round_number in range(config.max_rounds):
            shown = [
                self._shown(seeds, [task for task, _ in made], round_number, place)
                for place in range(config.prompts_per_round)
            ]
            asked = [
                self._asked(
                    asking.ask_for_tasks([task.instruction for task in examples], config.tasks_per_prompt),
                    config.max_task_length,
                    config.temperature,
                    round_number * config.prompts_per_round + place,
                )
                for place, examples in enumerate(shown)
            ]
            answers = self._written(asked)
            for one, examples, written in zip(asked, shown, answers, strict=True):
                for text in self._proposals(written):
                    if len(made) == config.num_rows:
                        step.drop("over_num_rows", text)
                        continue
                    reason = self.rules.on_instruction(text) or ("near_copy" if pool.is_near(text) else "")
                    step.count(reason, text)
                    if not reason:
                        pool.add(text)
                        told = {"task_prompt": one.digest, "seeds": [task.id for task in examples]}
                        made.append((Task(f"made-{len(made)}", text), told))
            self.report(len(made), config.num_rows, "instructions")
            if len(made) == config.num_rows or all(written.reason == BUDGET for written in answers):
                break
        return made

    def _proposals(self, written: Written) -> list[str]:
        step = self.account.instructions
        if written.reason:
            step.drop(written.reason)
            return []
        tasks, cut = asking.read_tasks(written.text, is_cut=written.is_cut)
        if cut:
            step.drop("cut_off", times=cut)
        if not tasks and not cut:
            step.drop("no_list", written.text)
        return tasks

    def _shown(self, seeds: Sequence[Task], made: Sequence[Task], round_number: int, place: int) -> list[Task]:
        """Examples for one prompt: seed tasks and new ones, in random order."""
        draw = random.Random(f"{self.config.seed}/examples/{round_number}/{place}")
        new = draw.sample(made, min(self.config.shown_made, len(made)))
        examples = [*draw.sample(seeds, min(self.config.shown_seeds, len(seeds))), *new]
        draw.shuffle(examples)
        return examples

    def _with_inputs(
        self, tasks: Sequence[tuple[Task, dict[str, Any]]], seeds: Sequence[Task]
    ) -> list[tuple[Task, dict[str, Any]]]:
        if not self.config.ask_for_inputs:
            return list(tasks)
        examples, step = _input_examples(seeds), self.account.inputs
        shown = [example.input for example in examples if example.input]
        kept: list[tuple[Task, dict[str, Any]]] = []
        for part in _parts(tasks):
            asked = [
                self._asked(
                    asking.ask_for_input(task.instruction, examples),
                    self.config.max_task_length,
                    self.config.temperature,
                    0,
                )
                for task, _ in part
            ]
            for (task, told), one, written in zip(part, asked, self._written(asked), strict=True):
                given = asking.read_input(written.text)
                reason = written.reason or (
                    "cut_off" if written.is_cut else self.rules.on_input(given, task.instruction, shown)
                )
                step.count(reason, f"{task.instruction}\n\n{written.text}")
                if not reason:
                    kept.append((replace(task, input=given), {**told, "input_prompt": one.digest}))
            self.report(step.entered, len(tasks), "inputs")
        return kept

    def _respond(self, drafts: Sequence[Draft]) -> list[Draft]:
        config, done = self.config, list[Draft]()
        for part in _parts(drafts):
            asked = [
                self._asked(draft.messages, config.max_response_length, config.response_temperature, number)
                for draft in part
                for number in range(config.num_responses)
            ]
            written = self._written(asked)
            candidates = [
                self._candidate(part[place // config.num_responses], one, answer)
                for place, (one, answer) in enumerate(zip(asked, written, strict=True))
            ]
            groups = [
                candidates[start : start + config.num_responses]
                for start in range(0, len(candidates), config.num_responses)
            ]
            for draft, group in zip(part, self._scored(part, groups), strict=True):
                done.append(self._best(draft, group))
            self.report(len(done), len(drafts), "responses")
        return done

    def _candidate(self, draft: Draft, asked: Asked, written: Written) -> Candidate:
        text = written.text.strip()
        prompt = draft.messages[-1]["content"]
        reason = written.reason or self.rules.on_response(text, prompt, is_cut=written.is_cut)
        self.account.responses.count(reason, f"{prompt}\n\n{text}")
        return Candidate(text, reason or ACCEPTED, asked.digest)

    def _scored(self, drafts: Sequence[Draft], groups: Sequence[list[Candidate]]) -> list[list[Candidate]]:
        if self.score is None:
            return list(groups)
        places = [
            (draft, candidate)
            for draft, group in zip(drafts, groups, strict=True)
            for candidate in group
            if candidate.outcome == ACCEPTED
        ]
        found = iter(self.score([(draft.messages, candidate.text) for draft, candidate in places]))

        def scored(candidate: Candidate) -> Candidate:
            if candidate.outcome != ACCEPTED:
                return candidate
            value = next(found)
            return replace(candidate, outcome=value) if isinstance(value, str) else replace(candidate, score=value)

        return [[scored(candidate) for candidate in group] for group in groups]

    def _best(self, draft: Draft, group: Sequence[Candidate]) -> Draft:
        """The highest score, and of equal ones the first; a row without response has the reason of its first one."""
        usable = [candidate for candidate in group if candidate.outcome == ACCEPTED]
        best = max(usable, key=lambda one: one.score if one.score is not None else 0.0, default=None)
        outcome = group[0].outcome if best is None else ACCEPTED
        least = self.config.min_score
        if best is not None and best.score is not None and least is not None and best.score < least:
            best, outcome = None, "score_too_low"
        told = {**draft.provenance, "sampled": len(group)}
        if best is not None:
            told |= {"prompt": best.prompt_digest} | ({} if best.score is None else {"score": best.score})
        return self._finished(replace(draft, candidates=tuple(group), chosen=best, provenance=told), outcome)

    def _question(self, passage: Passage, asked: Asked, written: Written, pool: Pool) -> Draft:
        task = None if written.reason or written.is_cut else asking.read_question(written.text)
        step, told = self.account.instructions, {"doc": passage.id, "source": passage.source, "prompt": asked.digest}
        if task is None:
            reason = written.reason or ("cut_off" if written.is_cut else "no_question")
            step.drop(reason, written.text)
            return self._finished(Draft((), told, (Candidate(written.text, reason),)), reason)
        reason = self.rules.on_instruction(task.instruction) or ("near_copy" if pool.is_near(task.instruction) else "")
        step.count(reason, task.instruction)
        prompt = asking.grounded_prompt(passage.text, task.instruction) if self.config.with_text else task.instruction
        draft = Draft(({"role": "user", "content": prompt},), {**told, "question": task.instruction})
        if not reason:
            reason = self.rules.on_response(task.response, task.instruction, is_cut=False)
            if not reason and support(task.response, passage.text) < self.config.min_support:
                reason = "not_in_text"
            self.account.responses.count(reason, f"{task.instruction}\n\n{task.response}")
        if not reason:
            pool.add(task.instruction)
        candidate = Candidate(task.response, reason or ACCEPTED, asked.digest)
        chosen = None if reason else candidate
        return self._finished(replace(draft, candidates=(candidate,), chosen=chosen), reason or ACCEPTED)

    def _finished(self, draft: Draft, outcome: str) -> Draft:
        shown = "\n\n".join([turn["content"] for turn in draft.messages] + [one.text for one in draft.candidates])
        self.account.rows.count("" if outcome == ACCEPTED else outcome, shown)
        return replace(draft, outcome=outcome)

    def _asked(self, turns: Turns | Sequence[Message], max_tokens: int, temperature: float, number: int) -> Asked:
        return Asked(turns, max_tokens, temperature, self.config.seed * _SEEDS_APART + number)

    def _written(self, asked: Sequence[Asked]) -> list[Written]:
        return self.write(asked) if asked else []


def rows(drafts: Sequence[Draft], *, method: Synthesis, generator: str, identity: str) -> Iterator[dict[str, Any]]:
    """One conversation for each accepted draft, in the format `messages`, with where it comes from. Earlier turns of
    the assistant were written by someone else and are no example."""
    for draft in drafts:
        if draft.chosen is not None:
            earlier = [{**turn, "weight": 0} if turn["role"] == "assistant" else dict(turn) for turn in draft.messages]
            yield {
                "messages": [*earlier, {"role": "assistant", "content": draft.chosen.text}],
                "provenance": {
                    "method": method.value,
                    "generator": generator,
                    "generator_identity": identity,
                    **draft.provenance,
                },
            }


def _input_examples(seeds: Sequence[Task]) -> list[Task]:
    """Alternating tasks with and without input, as far as there are both."""
    having, lacking = [task for task in seeds if task.input], [task for task in seeds if not task.input]
    number = min(_INPUT_EXAMPLES // 2, len(having), len(lacking))
    return [task for pair in zip(having[:number], lacking[:number], strict=True) for task in pair]


def _parts(items: Sequence[Any]) -> Iterator[Any]:
    for start in range(0, len(items), _SHARD):
        yield items[start : start + _SHARD]
