"""What may be spent at an endpoint, and what was.

A request is begun only when the most that it can cost still fits next to what was spent and what others may be spending
at this moment. So a budget is never exceeded, and the last request waits for the others instead of giving up early.
Once one does not fit, the rest is not asked.
"""

import threading
from dataclasses import dataclass

from stages.config.endpoints import EndpointConfig
from stages.models.endpoint.records import Usage


@dataclass(frozen=True)
class Spent:
    """Everything that one artifact cost at an endpoint, over all attempts."""

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    def __add__(self, usage: Usage) -> "Spent":
        return Spent(self.requests, self.prompt_tokens + usage.prompt_tokens, self.answer_tokens + usage.answer_tokens)


class Budget:
    """Shared by the threads of a client. `spent` is what earlier attempts cost."""

    def __init__(self, config: EndpointConfig, spent: Spent = Spent()) -> None:
        self._config, self._spent = config, spent
        self._open: list[Usage] = []
        self._is_over = False
        self._changed = threading.Condition()

    @property
    def spent(self) -> Spent:
        with self._changed:
            return self._spent

    @property
    def is_over(self) -> bool:
        """Whether a request was refused for it."""
        with self._changed:
            return self._is_over

    def begin(self, most: Usage) -> bool:
        """Set aside the most that a request can cost; False when the budget does not allow it. Waits while that
        depends on what the requests that are under way will have cost."""
        with self._changed:
            while not self._is_over:
                if self._fits(most, *self._open):
                    self._open.append(most)
                    self._spent = Spent(self._spent.requests + 1, self._spent.prompt_tokens, self._spent.answer_tokens)
                    return True
                if not self._open or not self._fits(most):
                    self._is_over = True
                    self._changed.notify_all()
                else:
                    self._changed.wait()
            return False

    def end(self, most: Usage, cost: Usage) -> None:
        """Put what a request did cost in the place of what was set aside."""
        with self._changed:
            self._open.remove(most)
            self._spent += cost
            self._changed.notify_all()

    def _fits(self, *further: Usage) -> bool:
        config, spent = self._config, self._spent
        for usage in further:
            spent += usage
        return (
            (not config.budget_requests or self._spent.requests < config.budget_requests)
            and (not config.budget_tokens or spent.tokens <= config.budget_tokens)
            and (not config.budget_cost or config.cost(spent.prompt_tokens, spent.answer_tokens) <= config.budget_cost)
        )
