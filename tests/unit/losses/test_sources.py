"""Every equation names the paper that it is from, and where it stands there."""

import inspect
import pkgutil
import re
from collections.abc import Callable
from importlib import import_module

import pytest

import stages.losses

_PAPER = re.compile(r"\b(19|20)\d\d\b|arXiv:\d{4}\.\d{5}")
_PLACE = re.compile(r"\b(eq\.|section|table|theorem)\s\d")

WITHOUT_A_PLACE = {
    "k1": "a blog post, which numbers no equations",
    "k2": "the same",
    "robust_dpo_loss": "the paper's loss, by its name",
    "supervised_loss": "a term that several papers add",
    "truncated_weights": "the subject of the paper",
    "merged_moments": "the subject of the paper",
    "lcs_length": "the subject of the paper",
}
ARITHMETIC = {
    "preference_loss": "chooses one of the losses",
    "desirable_loss": "a likelihood, as in supervised_loss",
    "pair_accuracy": "counts",
    "score_spreads": "a standard deviation",
    "explained_variance": "a share of a variance",
    "perplexity": "an exponential",
    "bits_per_byte": "a change of units",
    "words": "splits a text",
    "rouge_l": "the paper is named by its module",
}


def _equations() -> list[Callable[..., object]]:
    modules = [import_module(f"stages.losses.{found.name}") for found in pkgutil.iter_modules(stages.losses.__path__)]
    return [
        function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    ]


EQUATIONS = [function for function in _equations() if function.__name__ not in ARITHMETIC]


@pytest.mark.parametrize("function", EQUATIONS, ids=lambda function: function.__name__)
def test_an_equation_names_its_paper_and_its_place_in_it(function: Callable[..., object]) -> None:
    text = inspect.getdoc(function) or ""
    assert _PAPER.search(text), "no paper"
    assert bool(_PLACE.search(text)) is (function.__name__ not in WITHOUT_A_PLACE)


def test_the_exceptions_are_functions_that_there_are() -> None:
    assert {*WITHOUT_A_PLACE, *ARITHMETIC} <= {function.__name__ for function in _equations()}
