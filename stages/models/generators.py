"""Who writes texts that become training data: one protocol for models of this process and for endpoints.

`synthesize` and `constitution` ask a `Generator` chat requests and get, for each, a completion or the reason why there
is none. An endpoint is a `ChatClient`, which keeps every answer in the store. A model of this process is a
`ModelGenerator`; `Kept` puts its answers into the store, batch by batch, so that a killed attempt continues.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from stages.artifacts.store import Store
from stages.data.pairs.turns import Unusable
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.models.answers import Answerer, InProcess
from stages.models.endpoint.records import MAY_COME, TOO_LONG, ChatRequest, Completion, Outcome, Unanswered, Usage
from stages.models.generation import Sampling

logger = logging.getLogger(__name__)


class Generator(Protocol):
    """Whatever answers chat requests."""

    @property
    def name(self) -> str:
        """What people call it, for provenance."""
        ...

    @property
    def identity(self) -> str:
        """Hash over what decides its answers, as far as that is known."""
        ...

    def ask(self, requests: Sequence[ChatRequest]) -> list[Outcome]:
        """Return what came of each request, in order."""
        ...

    def account(self) -> dict[str, Any]:
        """What was asked and spent, for the ledger."""
        ...


class ModelGenerator:
    """A language model of this process, with its own tokenizer and chat template."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: LoadedTokenizer,
        *,
        name: str,
        content: str,
        device: torch.device,
        context_length: int,
        eos_id: int,
        seed: int,
        batch_size: int = 8,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`content` is the digest of the model, `context_length` the most tokens of a prompt and its answer, `eos_id`
        what ends an answer. `beat` is called after every batch."""
        self._model, self._tokenizer, self._device = model, tokenizer, device
        self._name, self._content, self._seed = name, content, seed
        self._context_length, self._eos_id, self._batch_size, self._beat = context_length, eos_id, batch_size, beat
        self._asked, self._usage = 0, Usage()

    @property
    def name(self) -> str:
        return self._name

    @property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps([self._content, self._seed]).encode()).hexdigest()

    def ask(self, requests: Sequence[ChatRequest]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(requests)
        alike: dict[tuple[int, float], list[int]] = {}
        encoded: dict[int, np.ndarray] = {}
        for place, request in enumerate(requests):
            try:
                encoded[place] = self._tokenizer.chat().encode_prompt([dict(turn) for turn in request.messages])
            except Unusable as error:
                outcomes[place] = Unanswered(error.reason)
                continue
            if len(encoded[place]) + request.max_tokens > self._context_length:
                outcomes[place] = Unanswered(TOO_LONG)
                continue
            alike.setdefault((request.max_tokens, request.temperature), []).append(place)
        for (max_tokens, temperature), places in alike.items():
            answerer = self._answerer(max_tokens, temperature)
            for start in range(0, len(places), self._batch_size):
                part = places[start : start + self._batch_size]
                numbers = [_number(requests[place]) for place in part]
                for place, ids in zip(
                    part, answerer.batch([encoded[place] for place in part], numbers=numbers), strict=True
                ):
                    outcomes[place] = self._completion(encoded[place], ids)
                self._beat()
        return [outcome for outcome in outcomes if outcome is not None]

    def account(self) -> dict[str, Any]:
        return {
            "requests": self._asked,
            "prompt_tokens": self._usage.prompt_tokens,
            "answer_tokens": self._usage.answer_tokens,
        }

    def _answerer(self, max_tokens: int, temperature: float) -> Answerer:
        sampling = Sampling(max_tokens, self._eos_id, self._tokenizer.pad_id, temperature)
        return Answerer(InProcess(self._model, self._device), sampling, seed=self._seed, batch_size=self._batch_size)

    def _completion(self, prompt: np.ndarray, ids: np.ndarray) -> Completion:
        usage = Usage(len(prompt), len(ids))
        self._asked, self._usage = self._asked + 1, self._usage + usage
        ended = len(ids) > 0 and int(ids[-1]) == self._eos_id
        text = self._tokenizer.backend.decode(ids.tolist(), skip_special_tokens=True)
        return Completion(text, "stop" if ended else "length", usage)


def _number(request: ChatRequest) -> int:
    """Which random numbers an answer uses: its own for every request, whatever else is asked and in which order."""
    told = json.dumps([[dict(turn) for turn in request.messages], request.number], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:4])


class Kept:
    """A generator whose answers are kept in the store below `folder`, one object for each call of `ask`.

    The same call, of the same generator, is answered from there: callers that ask in a fixed order continue after a
    kill with the first call that was not finished.
    """

    def __init__(
        self, generator: Generator, store: Store, folder: str, *, check_lease: Callable[[], None] = lambda: None
    ) -> None:
        """`check_lease` raises when this process may write nothing any more."""
        self._generator, self._store, self._folder, self._check_lease = generator, store, folder, check_lease
        self._calls, self._found, self._usage = 0, 0, Usage()

    @property
    def name(self) -> str:
        return self._generator.name

    @property
    def identity(self) -> str:
        return self._generator.identity

    def ask(self, requests: Sequence[ChatRequest]) -> list[Outcome]:
        told = json.dumps([self.identity, [asdict(request) for request in requests]], ensure_ascii=False)
        key = f"{self._folder}/{hashlib.sha256(told.encode()).hexdigest()}.json"
        outcomes = self._read(key, len(requests))
        self._calls += len(requests)
        if outcomes is not None:
            self._found += len(requests)
        else:
            outcomes = self._generator.ask(requests)
            if not any(isinstance(one, Unanswered) and one.reason in MAY_COME for one in outcomes):
                # Whoever lost the lease may be running beside its successor, and must write nothing any more.
                self._check_lease()
                rows = [asdict(one) if isinstance(one, Unanswered) else one.to_json() for one in outcomes]
                self._store.write_bytes(key, json.dumps(rows, ensure_ascii=False).encode())
        for outcome in outcomes:
            self._usage += outcome.usage if isinstance(outcome, Completion) else Usage()
        return outcomes

    def account(self) -> dict[str, Any]:
        """All attempts together: what earlier ones kept counts as asked."""
        return {
            "requests": self._calls,
            "prompt_tokens": self._usage.prompt_tokens,
            "answer_tokens": self._usage.answer_tokens,
            "found_in_store": self._found,
        }

    def _read(self, key: str, count: int) -> list[Outcome] | None:
        try:
            rows = json.loads(self._store.read_bytes(key))
            if not isinstance(rows, list) or len(rows) != count:
                raise ValueError(f"it is no list of {count} answers")
            return [
                Unanswered(row["reason"], row["told"]) if "reason" in row else Completion.from_json(row) for row in rows
            ]
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("%s/%s is not used, and asked again: %s", self._store.root_uri, key, error)
            return None
