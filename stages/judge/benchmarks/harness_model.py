"""One of our models as lm-evaluation-harness sees a model: text in, likelihoods and responses out."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from stages.config.benchmarks import LONGEST_RESPONSE
from stages.config.errors import StageError
from stages.data.pairs.turns import Unusable
from stages.data.tokens.shape import shaped
from stages.data.tokens.template import ChatTemplate
from stages.judge.benchmarks.asking import EMPTY, CannotAskError, Pair, begin_id, plain_pair, plain_prompt
from stages.judge.benchmarks.facets import silent
from stages.judge.benchmarks.likelihood import fits, likelihoods
from stages.judge.benchmarks.writing import Written, sample, write
from stages.judge.heldout import NO_TEMPLATE, TOO_LONG
from stages.judge.suite import Subject

_NOTHING = (0.0, False)


class HarnessModel(LM):
    """Answers requests; those that do not fit are noted in `skipped`, by task and document, and get a filler."""

    def __init__(self, subject: Subject, *, chat: bool, beat: Callable[[], None] = silent) -> None:
        super().__init__()
        self._subject, self._chat, self._beat = subject, chat, beat
        self._tokenizer = subject.tokenizer
        self.skipped: dict[tuple[str, int], str] = {}
        # The template runs in a sandbox with limits of its own, as everywhere here.
        self._template = (
            ChatTemplate(self._tokenizer.chat_template, self._tokenizer.special_tokens)
            if chat and self._tokenizer.chat_template
            else None
        )

    @property
    def tokenizer_name(self) -> str:
        return self._subject.identity

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        pairs = [self._asked(request, lambda request: self._pair(*request.args)) for request in requests]
        found = iter(likelihoods(self._subject, [pair for pair in pairs if pair is not None], beat=self._beat))
        answers = []
        for pair in pairs:
            score = None if pair is None else next(found)
            answers.append(_NOTHING if score is None else (score.logprob, score.greedy))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Long texts in windows that follow each other, each after the token before it."""
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(likelihoods(self._subject, [pair for pairs in windows for pair in pairs], beat=self._beat))
        sums = []
        for request, pairs in zip(requests, windows, strict=True):
            if not pairs:
                self.skipped[(request.task_name, request.doc_id)] = EMPTY
            sums.append(float(sum(next(found).logprob for _ in pairs)))
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        prompts = [self._asked(request, self._prompt) for request in requests]
        responses = ["" for _ in requests]
        for kwargs in {_frozen(request.args[1]): request.args[1] for request in requests}.values():
            places = [
                place
                for place, request in enumerate(requests)
                if request.args[1] == kwargs and prompts[place] is not None
            ]
            written = self._written([prompts[place] for place in places], kwargs)
            for place, response in zip(places, written, strict=True):
                responses[place] = response.text
        return responses

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without a generation prompt its last message is a beginning that the model goes on
        from."""
        if self._template is None:
            return ""
        start = chat_history if add_generation_prompt else chat_history[:-1]
        try:
            conversation = shaped(start, (), self._template.form)
            text = self._template.render(conversation, add_generation_prompt=True).text
        except (Unusable, StageError):
            return ""
        return text if add_generation_prompt else text + chat_history[-1]["content"]

    def _asked(self, request: Any, make: Callable[[Any], Any]) -> Any:
        try:
            if self._chat and not request.args[0]:
                raise CannotAskError(NO_TEMPLATE)
            return make(request)
        except CannotAskError as reason:
            self.skipped[(request.task_name, request.doc_id)] = str(reason)
            return None

    def _pair(self, context: str, continuation: str) -> Pair:
        pair = (
            self._chat_pair(context, continuation) if self._chat else plain_pair(self._tokenizer, context, continuation)
        )
        if not len(pair.continuation):
            raise CannotAskError(EMPTY)
        if not fits(self._subject, pair):
            raise CannotAskError(TOO_LONG)
        return pair

    def _chat_pair(self, context: str, continuation: str) -> Pair:
        """The context is a rendered template, in which control tokens are control tokens."""
        bare = context.rstrip()
        whole, start = self._rendered(context + continuation), self._rendered(bare)
        return Pair(start, whole[len(start) :])

    def _rendered(self, text: str) -> np.ndarray:
        begin = self._tokenizer.special_tokens.get("bos_token") or ""
        adds = not (begin and text.startswith(begin))
        return np.asarray(self._tokenizer.backend.encode(text, add_special_tokens=adds).ids, dtype=np.int64)

    def _windows(self, text: str) -> list[Pair]:
        (ids,) = self._tokenizer.encode_plain([text])
        tokens = [*self._tokenizer.text_prefix.tolist(), *ids.tolist()]
        # One less than the harness: its last token is never read, ours is laid out with the others.
        windows = get_rolling_token_windows(
            tokens, prefix_token=begin_id(self._tokenizer), max_seq_len=self._subject.context_length - 1, context_len=1
        )
        return [
            Pair(np.asarray(context, dtype=np.int64), np.asarray(predicted, dtype=np.int64))
            for context, predicted in map(make_disjoint_window, windows)
        ]

    def _prompt(self, request: Any) -> np.ndarray:
        context, kwargs = request.args
        ids = self._rendered(context) if self._chat else plain_prompt(self._tokenizer, context)
        if len(ids) + longest_response(kwargs) > self._subject.context_length:
            raise CannotAskError(TOO_LONG)
        return ids

    def _written(self, prompts: list[np.ndarray], kwargs: dict[str, Any]) -> list[Written]:
        until = kwargs.get("until") or []
        stops = [stop for stop in (until if isinstance(until, list) else [until]) if stop]
        longest, temperature = longest_response(kwargs), float(kwargs.get("temperature") or 0.0)
        # As the harness: a temperature alone samples, unless do_sample says that it does not.
        if temperature and kwargs.get("do_sample", True):
            sampled = sample(self._subject, prompts, max_tokens=longest, temperature=temperature)
            return [Written(_cut(response.text, stops), response.tokens) for response in sampled]
        return write(self._subject, prompts, max_tokens=longest, stops=stops, beat=self._beat)


def longest_response(kwargs: dict[str, Any]) -> int:
    """Tokens that a request may be answered with, by whichever name it says so."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return int(next((kwargs[name] for name in names if kwargs.get(name) is not None), LONGEST_RESPONSE))


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


def _frozen(kwargs: dict[str, Any]) -> str:
    return repr(sorted(kwargs.items(), key=lambda pair: pair[0]))
