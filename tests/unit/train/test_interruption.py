"""All ranks do the same at the same step, whoever was asked."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from stages.train.interruption import Ask, Interruption


class Ranks:
    """Ranks as threads, with a collective that waits for all of them."""

    def __init__(self, count: int, *, departs: bool = False) -> None:
        self.now = 0.0
        self.flags = [threading.Event() for _ in range(count)]
        self.questions = [0] * count
        self._said = [Ask.NOTHING] * count
        self._barrier = threading.Barrier(count)
        self._departs = departs
        self._interruptions = [self._interruption(rank) for rank in range(count)]
        self._pool = ThreadPoolExecutor(count)

    def asked(self) -> list[Ask]:
        """What every rank is told at the next step boundary."""
        return list(self._pool.map(lambda one: one.asked(), self._interruptions))

    def _interruption(self, rank: int) -> Interruption:
        def agree(mine: Ask, device: torch.device) -> Ask:
            self._said[rank] = mine
            self._barrier.wait(10)
            answer = max(self._said)
            self._barrier.wait(10)
            return answer

        def departs() -> bool:
            self.questions[rank] += 1
            return self._departs

        return Interruption(torch.device("cpu"), self.flags[rank], agree=agree, departs=departs, clock=lambda: self.now)


def test_one_rank_that_is_asked_to_stop_stops_all() -> None:
    ranks = Ranks(3)
    assert ranks.asked() == [Ask.NOTHING] * 3
    ranks.flags[0].set()
    assert ranks.asked() == [Ask.END] * 3


def test_a_departing_node_makes_one_checkpoint_and_training_goes_on() -> None:
    ranks = Ranks(2, departs=True)
    ranks.now = 6.0
    assert ranks.asked() == [Ask.SAVE, Ask.SAVE]
    ranks.now = 60.0
    assert ranks.asked() == [Ask.NOTHING, Ask.NOTHING]
    assert ranks.questions == [1, 1]


def test_a_stop_is_more_pressing_than_a_departing_node() -> None:
    ranks = Ranks(2, departs=True)
    ranks.now = 6.0
    ranks.flags[0].set()
    assert ranks.asked() == [Ask.END, Ask.END]


def test_a_training_in_the_jobs_own_process_has_no_ray_train_to_ask() -> None:
    now = 0.0
    alone = Interruption(torch.device("cpu"), threading.Event(), clock=lambda: now)
    now = 60.0
    assert alone.asked() is Ask.NOTHING


def test_ray_train_is_asked_every_few_seconds_only() -> None:
    ranks = Ranks(2)
    for now in (1.0, 4.9, 5.0, 5.1, 9.9, 10.0):
        ranks.now = now
        assert ranks.asked() == [Ask.NOTHING, Ask.NOTHING]
    assert ranks.questions == [2, 2]
