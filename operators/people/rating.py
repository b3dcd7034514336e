"""One question to a person: which of these responses is better, or in which order they are good.

Asked on Airflow's page of required actions. Every possible answer is an option, rankings included, so Airflow itself
rejects anything else, and no free text has to be parsed.
"""

import random
from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from itertools import permutations
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Param

from operators.failures import as_stage_failures
from operators.people.asking import ask_once, comment_of, name_of, with_usable_fields
from stages.artifacts.manifests import read_file
from stages.config.graph import Stage
from stages.config.markdown import block
from stages.config.principles import Area
from stages.config.records import parse_object
from stages.config.request import ArtifactRef

LABELS = "ABCD"
TIE, SKIP = "Tie", "Skip"


class Outcome(StrEnum):
    """How a question ended."""

    ANSWERED = "answered"
    TIE = "tie"
    SKIPPED = "skipped"
    UNANSWERED = "unanswered"


_REASONS = [area.value for area in Area]


def _fields() -> dict[str, Param]:
    """In place of the DAG's params, which Airflow passes to every operator."""
    return {
        "reasons": Param(
            [],
            source="task",
            type=["array", "null"],
            items={"type": "string", "enum": _REASONS},
            examples=_REASONS,
            title="Because the better one is more",
            description="Any of them, or none.",
        ),
        "comment": Param("", source="task", type=["string", "null"], title="Comment"),
    }


class PreferenceRating(HITLOperator):
    """Ask one question and return the answer as JSON; map it over what `questions_of` returns."""

    ui_color = "#f7ead7"

    def __init__(self, *, question: dict[str, Any], respond_task_id: str = Stage.RESPOND.value, **kwargs: Any) -> None:
        kwargs["params"] = _fields()
        super().__init__(subject="Which response is better?", options=options(2), defaults=SKIP, **kwargs)
        self.question = question
        self.respond_task_id = respond_task_id

    def execute(self, context: Any) -> Any:
        responses = ArtifactRef.model_validate(context["ti"].xcom_pull(task_ids=self.respond_task_id))
        with as_stage_failures():
            row = read_responses(responses)[self.question["index"]]
        order = self.question["order"]
        self.options = options(len(order))
        self.subject = (
            f"{'Which response is better' if len(order) == 2 else 'Rank the responses'}: {self.question['title']}"
        )
        self.body = body(row, order)
        hours = context["params"]["answer_hours"]
        self.response_timeout = timedelta(hours=hours)
        return ask_once(self, context, super().execute)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> dict[str, Any]:
        self.options = options(len(self.question["order"]))
        answer = super().execute_complete(context, with_usable_fields(self, event))
        return read_answer(self.question, answer, timed_out=bool(event.get("timedout")))


def options(num_responses: int) -> list[str]:
    """A or B for two responses, every ranking from best to worst for more; always also a tie and a skip."""
    labels = LABELS[:num_responses]
    ranked = list(labels) if num_responses == 2 else [" > ".join(ranking) for ranking in permutations(labels)]
    return [*ranked, TIE, SKIP]


def shown_order(num_responses: int, *, seed: int, prompt_id: str) -> list[int]:
    """Which response is shown as A, B, ...: random, so that no position has an advantage, and the same every time."""
    order = list(range(num_responses))
    random.Random(f"{seed}:{prompt_id}").shuffle(order)
    return order


def read_responses(responses: ArtifactRef) -> list[dict[str, Any]]:
    """The rows of a `responses` artifact; of bytes, because texts may hold what ends a line only in Unicode."""
    name = f"{responses.uri}/responses.jsonl"
    return [parse_object(line, name) for line in read_file(responses, "responses.jsonl").splitlines()]


def body(row: Mapping[str, Any], order: Sequence[int]) -> str:
    """The question as Markdown: prompt and responses unchanged, in fences that they cannot close."""
    shown = [f"### {label}\n\n{block(row['responses'][index])}" for label, index in zip(LABELS, order, strict=False)]
    how = (
        "Choose the better response."
        if len(order) == 2
        else "Choose the ranking, best first; every ordered pair of it becomes a preference."
    )
    closing = f"{how} **{TIE}**: equally good or bad. **{SKIP}**: you cannot or do not want to say. Both are counted."
    return "\n\n".join(["### Prompt", block(row["prompt"]), *shown, closing])


def read_answer(question: Mapping[str, Any], answer: Mapping[str, Any], *, timed_out: bool) -> dict[str, Any]:
    """Return the outcome; `ranking` holds positions of responses in the artifact, best first, not the letters shown."""
    order, (chosen, *_) = question["order"], answer["chosen_options"]
    fields = answer.get("params_input") or {}
    ranking: list[int] = []
    match chosen:
        case _ if timed_out:
            outcome = Outcome.UNANSWERED
        case "Tie":
            outcome = Outcome.TIE
        case "Skip":
            outcome = Outcome.SKIPPED
        case _:
            outcome = Outcome.ANSWERED
            letters = chosen.split(" > ") if len(order) > 2 else [chosen, *set(LABELS[:2]) - {chosen}]
            ranking = [order[LABELS.index(letter)] for letter in letters]
    return {
        "index": question["index"],
        "order": list(order),
        "outcome": outcome.value,
        "ranking": ranking,
        "reasons": list(dict.fromkeys(fields.get("reasons") or [])),
        "comment": comment_of(answer),
        "by": "" if timed_out else name_of(answer),
        "at": answer["responded_at"].isoformat(timespec="seconds"),
    }
