"""The held-out texts that a run's tokens were made from, found by lineage: only the parts that are needed are read.

Without them (the curated data is gone, or the tokens came from elsewhere) models with the run's tokenizer are measured
as before, and others on documents alone. The reason is logged and stands in the evaluation's record.
"""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.artifacts.manifests import read_file, read_manifest
from stages.config.errors import Category, DamagedArtifactError, DataError, StageError
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import stage_config_from_json
from stages.config.request import ArtifactRef, Manifest
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.encoding import Originals
from stages.data.tokens.originals import originals_of
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.data.tokens.views import Split, TokensArtifact
from stages.job.context import StageContext

logger = logging.getLogger(__name__)

_ADVICE = "Build the run's data again."


@dataclass(frozen=True)
class Texts:
    """The texts of the held-out split, as far as they are known."""

    originals: Originals | None = None
    documents: "CuratedDocuments | None" = None
    missing: str = ""
    """Why there are none."""


class CuratedDocuments:
    """Held-out documents by number; call it with the numbers that are wanted, in ascending order."""

    def __init__(self, ref: ArtifactRef, tokens: TokensArtifact, tokenizer: LoadedTokenizer) -> None:
        self._ref, self._tokens, self._tokenizer = ref, tokens, tokenizer

    def __call__(self, numbers: Sequence[int]) -> list[str]:
        """Return the texts; raises DataError when they are not those of the tokens."""
        wanted = set(numbers)
        lines = lines_of(self._ref, f"documents/{Split.HELDOUT}/")
        texts = [json.loads(line)["text"] for number, line in enumerate(lines) if number in wanted]
        published = self._tokens.documents(Split.HELDOUT)
        again = self._tokenizer.encode_texts(texts) if texts else []
        same = len(texts) == len(numbers) and all(
            np.array_equal(ids, published[number]) for number, ids in zip(numbers, again, strict=True)
        )
        if not same:
            raise DataError(f"the documents of {self._ref.uri} are not those of the tokens", advice=_ADVICE)
        return texts


def find_texts(
    context: StageContext, tokens: TokensArtifact, tokenizer: LoadedTokenizer, settings: TokenizeConfig
) -> Texts:
    """Return the texts behind the tokens of this evaluation; a reason where there are none."""
    ref = curated_data(context, read_manifest(context.inputs["tokens"]))
    if ref is None:
        return _without("the tokens do not name the curated data that they were made from")
    try:
        rows = lambda part: map(json.loads, lines_of(ref, f"{part}/{Split.HELDOUT}.jsonl.gz"))  # noqa: E731
        originals = originals_of(tokens, tokenizer, settings, rows, split=Split.HELDOUT)
        return Texts(originals, CuratedDocuments(ref, tokens, tokenizer))
    except (StageError, FileNotFoundError, EOFError, gzip.BadGzipFile, zlib.error, KeyError, ValueError) as error:
        if isinstance(error, StageError) and not _is_permanent(error):
            raise
        return _without(f"{ref.uri}: {error}")


def _without(reason: str) -> Texts:
    logger.info("held-out texts are not known, so models with another tokenizer are measured on less: %s", reason)
    return Texts(missing=reason)


def _is_permanent(error: StageError) -> bool:
    return isinstance(error, DamagedArtifactError) or error.category in (Category.CONFIG, Category.DATA)


def curated_data(context: StageContext, tokens: Manifest) -> ArtifactRef | None:
    """The curated data of the tokens by their own record, else by the run's inputs."""
    spec = GRAPH[Stage.CURATE]
    named = next((entry.ref() for entry in tokens.inputs if entry.kind == spec.kind), None)
    return named or context.inputs.get(spec.role)


def lines_of(ref: ArtifactRef, prefix: str) -> Iterator[str]:
    """The lines of an artifact's files below a prefix, in name order."""
    names = sorted(entry.path for entry in read_manifest(ref).files if entry.path.startswith(prefix))
    for name in names:
        # Not `splitlines`: texts may hold other characters that end a line.
        yield from filter(None, gzip.decompress(read_file(ref, name)).decode().split("\n"))


def tokenize_settings(context: StageContext) -> TokenizeConfig:
    """The settings that the run's tokens were made with."""
    found: Any = stage_config_from_json(Stage.TOKENIZE, read_manifest(context.inputs["tokens"]).config)
    assert isinstance(found, TokenizeConfig)
    return found
