"""The models that an evaluation measures, opened one at a time, each with its own tokenizer.

Models of the run have the run's tokenizer and its exact ids. The champion comes with the tokenizer in its folder; where
that is the run's, it reads the run's ids as well. Its identity says what a measurement of it depends on: content,
tokenizer, context and number format, but not its role or its place.
"""

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from stages.artifacts.manifests import canonical_json
from stages.config.closing import EvaluateConfig
from stages.config.errors import Category, ConfigError, DamagedArtifactError, StageError
from stages.config.evaluation import CHAMPION_ROLE
from stages.config.graph import BASE_MODEL, GRAPH, REWARD_MODEL, aligned_models, language_models, trained_stages
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.data.tokens.views import TokensArtifact
from stages.job.context import StageContext
from stages.judge.suite import Subject
from stages.models.answers import Answerer, InProcess
from stages.models.build import load_causal_lm, load_scorer, load_with_own_tokenizer, positions_of
from stages.models.generation import Sampling
from stages.models.given_tokenizer import given_tokenizer
from stages.models.precision import compute_dtype
from stages.models.same_tokenizer import check_given_scorer

logger = logging.getLogger(__name__)

_KEPT_OPEN = 2
"""Language models in memory: the one that is measured, and the one that it started from."""


@dataclass(frozen=True)
class _Known:
    """A model that can be opened."""

    role: str
    folder: Path
    content: str
    """Digest of its content."""
    tokenizer: LoadedTokenizer
    end_id: int
    """What ends an assistant's turn."""


class Subjects:
    """Opens language models by role, and the run's reward model."""

    def __init__(
        self,
        context: StageContext,
        tokens: TokensArtifact,
        tokenizer: LoadedTokenizer,
        *,
        device: torch.device,
    ) -> None:
        assert isinstance(context.config, EvaluateConfig)
        self._context, self._tokens, self._tokenizer, self._device = context, tokens, tokenizer, device
        self._seed = context.config.seed
        self.missing_champion = ""
        """Why there is no champion to measure, where one was given."""
        self._known = {
            role: _Known(role, folder, context.content_of(role, BASE_MODEL), tokenizer, tokens.eos_id)
            for role, folder in model_folders(context).items()
        }
        if CHAMPION_ROLE in context.inputs:
            self._add_champion()
        self._open: dict[str, Subject] = {}
        self._scorers: dict[str, nn.Module] = {}

    @property
    def roles(self) -> list[str]:
        """In the order of the pipeline, the champion last."""
        return list(self._known)

    @property
    def start(self) -> str:
        """Role of the model that the aligned ones start from; empty where it is not measured."""
        usual = reference_role(self._known)
        return usual if usual in self._known else ""

    @property
    def scorer_identity(self) -> str:
        """Digest of the reward model; empty without one."""
        try:
            return self._context.content_of(scorer_role(), REWARD_MODEL)
        except KeyError:
            return ""

    @property
    def scorer_measured_as(self) -> str:
        """What a measurement of the reward model depends on, as a digest."""
        return _digest([self.scorer_identity, self._tokenizer.digest, str(compute_dtype(self._device))])

    def reads_run_tokens(self, role: str) -> bool:
        """Whether a model has the run's tokenizer and chat template."""
        return self._known[role].tokenizer.digest == self._tokenizer.digest

    def identity(self, role: str) -> str:
        """What a measurement of this model depends on, as a digest."""
        known = self._known[role]
        told = [known.content, known.tokenizer.digest, known.end_id, self._tokens.sequence_length]
        return _digest([*told, str(compute_dtype(self._device))])

    def open(self, role: str) -> Subject:
        """Load a model, or return it if it is still in memory."""
        if role in self._open:
            self._open[role] = self._open.pop(role)  # the most recently used stands last
            return self._open[role]
        while len(self._open) >= _KEPT_OPEN:
            # The start is needed again by every aligned model.
            del self._open[next(name for name in self._open if name != self.start or len(self._open) == 1)]
        self._open[role] = self._loaded(self._known[role])
        return self._open[role]

    def scorer(self) -> nn.Module:
        """Load the reward model, or return it if it is in memory."""
        role = scorer_role()
        if role not in self._scorers:
            folder = self._context.model_dir(role, REWARD_MODEL)
            if self._context.has_given(REWARD_MODEL):
                check_given_scorer(folder, self._tokenizer.backend, role=REWARD_MODEL)
            self._scorers[role] = self._placed(load_scorer(folder, self._tokens))
        return self._scorers[role]

    def scorer_as_subject(self) -> Subject:
        """The reward model, for suites that measure it."""
        return Subject(
            role=scorer_role(),
            identity=self.scorer_measured_as,
            model=self.scorer(),
            tokenizer=self._tokenizer,
            device=self._device,
            context_length=self._tokens.sequence_length,
            answerer=writes_nothing,
        )

    def _add_champion(self) -> None:
        """Take the champion in if it can be read; it may be gone, or have been made by a later release."""
        try:
            folder = self._context.input_dir(CHAMPION_ROLE)
            own = given_tokenizer(folder)
            shares = own.digest == self._tokenizer.digest
            self._known[CHAMPION_ROLE] = _Known(
                CHAMPION_ROLE,
                folder,
                self._context.content_of(CHAMPION_ROLE),
                self._tokenizer if shares else own,
                self._tokens.eos_id if shares else end_id(own),
            )
        except Exception as error:
            # An outage passes, so the retry may measure it; whatever else its files break costs the comparison alone.
            if isinstance(error, StageError | OSError | MemoryError) and not is_permanent(error):
                raise
            self.missing_champion = str(error)
            logger.warning("the champion is not measured: %s", error, exc_info=not isinstance(error, StageError))

    def forget(self, role: str, reason: str) -> None:
        """Leave a champion out that could not be loaded."""
        del self._known[role]
        self.missing_champion = reason

    def _loaded(self, known: _Known) -> Subject:
        if known.role == CHAMPION_ROLE:
            # Also with the run's tokenizer it may have fewer positions: then what is longer is skipped.
            loaded = load_with_own_tokenizer(known.folder, known.tokenizer)
        else:
            loaded = load_causal_lm(known.folder, self._tokens)
        model = self._placed(loaded)
        pad_id = self._tokens.pad_id if known.tokenizer is self._tokenizer else known.tokenizer.pad_id

        def answerer(max_response_length: int, temperature: float) -> Answerer:
            sampling = Sampling(max_response_length, eos_id=known.end_id, pad_id=pad_id, temperature=temperature)
            return Answerer(InProcess(model, self._device), sampling, seed=self._seed)

        return Subject(
            role=known.role,
            identity=self.identity(known.role),
            model=model,
            tokenizer=known.tokenizer,
            device=self._device,
            context_length=positions_of(loaded) or self._tokens.sequence_length,
            answerer=answerer,
        )

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.eval().to(self._device)


def language_roles() -> list[str]:
    """Roles of the models that write text, in the order of the pipeline; the first may be a given base model."""
    return [spec.role for spec in language_models()]


def reference_role(roles: Collection[str]) -> str:
    """Role of the model that the aligned ones start from: KL, implicit rewards and win rates are relative to it. Where
    the run has not made it, the given model has taken its place."""
    usual = GRAPH[dict(aligned_models()[0].inputs)["model"]].role
    return usual if usual in roles else language_roles()[0]


def scorer_role() -> str:
    return next(spec.role for spec in trained_stages() if spec.scores)


def model_folders(context: StageContext) -> dict[str, Path]:
    """The run's language models by role, in the order of the pipeline."""
    folders = {role: context.input_dir(role) for role in language_roles() if role in context.inputs}
    if context.has_base_model:  # unless the run has trained it further and so has a base model of its own
        folders = {language_roles()[0]: context.given_dir(BASE_MODEL), **folders}
    return folders


def is_permanent(error: Exception) -> bool:
    """Whether an error about the champion's files means that no retry can measure it."""
    if isinstance(error, FileNotFoundError | DamagedArtifactError):
        return True
    return isinstance(error, StageError) and error.category in (Category.CONFIG, Category.DATA)


def end_id(tokenizer: LoadedTokenizer) -> int:
    """What ends an assistant's turn in a chat template, or a text where the template cannot be used for chats."""
    try:
        return tokenizer.chat().check()
    except ConfigError as error:
        logger.warning("the champion's chat template is not one to train with: %s", error.message)
        return tokenizer.eos_id


def writes_nothing(max_response_length: int, temperature: float) -> Answerer:
    raise AssertionError("a reward model writes no text")


def _digest(told: object) -> str:
    return hashlib.sha256(canonical_json(told)).hexdigest()
