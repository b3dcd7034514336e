"""What a model writes for a prompt, up to a text at which it is to stop.

Greedy responses are written in rounds, so that a model which has reached the stop does not write on to the last token;
each round reads prompt and response so far again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.judge.benchmarks.facets import silent
from stages.judge.suite import Subject
from stages.models.answers import Answerer, InProcess

_ROUND = 64


@dataclass(frozen=True)
class Written:
    """One response."""

    text: str
    """Without the stop and what follows it, and without control tokens."""
    tokens: int
    """That were written, the end token included."""


def write(
    subject: Subject,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    stops: Sequence[str] = (),
    beat: Callable[[], None] = silent,
) -> list[Written]:
    """Return the greedy response to each prompt; prompt and response must fit the model's context."""
    responses = [np.empty(0, dtype=np.int64) for _ in prompts]
    waiting = list(range(len(prompts)))
    while waiting:
        left = {number: max_tokens - len(responses[number]) for number in waiting}
        size = min(_ROUND, *left.values())
        answerer = exact(subject.answerer(size, 0.0))
        asked = [np.concatenate([prompts[number], responses[number]]) for number in waiting]
        written: list[np.ndarray] = []
        for batch in answerer.in_batches(asked):
            written += batch
            beat()
        for number, response in zip(waiting, written, strict=True):
            responses[number] = np.concatenate([responses[number], response])
        waiting = [
            number
            for number in waiting
            if len(responses[number]) < max_tokens
            and answerer.sampling.eos_id not in responses[number]
            and not any(stop in _decoded(subject, responses[number]) for stop in stops)
        ]
    return [_written(subject, response, stops) for response in responses]


def sample(subject: Subject, prompts: Sequence[np.ndarray], *, max_tokens: int, temperature: float) -> list[Written]:
    """Return a sampled response to each prompt; which one depends on its number."""
    answers = subject.answerer(max_tokens, temperature).answers(prompts)
    return [_written(subject, response, ()) for response in answers]


def exact(answerer: Answerer) -> Answerer:
    """The same in the precision of the weights, where the model is in this process."""
    if isinstance(answerer.backend, InProcess):
        return replace(answerer, backend=replace(answerer.backend, precision="fp32"))
    return answerer


def _written(subject: Subject, response: np.ndarray, stops: Sequence[str]) -> Written:
    text = _decoded(subject, response)
    for stop in stops:
        text = text.split(stop, 1)[0]
    return Written(text, tokens=len(response))


def _decoded(subject: Subject, response: np.ndarray) -> str:
    return subject.tokenizer.backend.decode(response.tolist(), skip_special_tokens=True)
