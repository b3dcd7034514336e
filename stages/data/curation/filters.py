"""The filters of documents, as datatrove blocks. `document_filters` lists them, in steps that the ledger counts.

To add one: a field in `config/curate.py`, a `BaseFilter` here whose `filter` returns True or (False, reason), and its
place in `document_filters`. The ledger, the metrics and the samples of what it drops follow from that.

datatrove's own language filter downloads a model and its bad-word list comes from the internet, so those two are
written here. Its Gopher, C4 and FineWeb filters are used as they are. They look words up through one cache, so a
document is split once; with spaCy that split would take nearly all of the time.
"""

import re
from functools import lru_cache
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

from stages.config.curate import CurateConfig, QualityThresholds
from stages.data.curation.ledger import Step
from stages.data.curation.toxicity import ToxicityScorer, toxicity_scorer
from stages.data.sources.records import utf8_size

# Dotted names and runs of one mark are one word each, as in spaCy: with this 98 % of documents get the same verdict.
_WORD = re.compile(r"\w+(?:[.'’/_-]\w+)*|-+|=+|>+|\.+|#+|\*+|~+|[^\w\s]")
_SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"')\]]*\s*|[^.!?]+$")


class RegexWordTokenizer(WordTokenizer):
    """Words and single punctuation marks, which nearly always gives the count of spaCy's English tokenizer."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence.strip() for sentence in _SENTENCE.findall(text) if sentence.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in _SENTENCE.finditer(text)]


class SimplifiedTokenizer(RegexWordTokenizer):
    """For MinHash, whose text has already lost its punctuation: split at white space."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


class DropRecorder:
    """Takes the place of datatrove's `exclusion_writer`: what a filter drops goes into the ledger, not to disk."""

    def __init__(self, step: Step, samples: int, planted: dict[str, str]) -> None:
        self._step, self._samples, self._planted = step, samples, planted

    def __enter__(self) -> "DropRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def write(self, document: Document, rank: int = 0) -> None:
        reason = document.metadata.get("filter_reason", "rejected")
        if document.metadata["planted"]:
            self._planted[document.id] = f"{self._step.name}/{reason}"
        self._step.drop(reason, document.id, document.text, samples=self._samples)


class Accounted(PipelineStep):
    """Runs filters one after another as one step of the ledger, which counts what enters, stays and is rewritten.

    `planted` receives, by id, which `step/reason` dropped a planted document.
    """

    type = "ACCOUNT"

    def __init__(self, step: Step, filters: list[BaseFilter], samples: int, planted: dict[str, str]) -> None:
        super().__init__()
        self.name = step.name
        self.step, self.filters = step, filters
        for block in filters:
            block.exclusion_writer = DropRecorder(step, samples, planted)  # pyright: ignore[reportAttributeAccessIssue]

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        chain: Any = self._count_in(data)
        for block in self.filters:
            chain = block.run(_resized(chain, self.step), rank, world_size)
        for document in _resized(chain, self.step):
            self.step.kept.add(document.metadata["size"])
            yield document

    def _count_in(self, data: Any) -> Any:
        for document in data:
            document.metadata["size"] = utf8_size(document.text)
            self.step.entered.add(document.metadata["size"])
            yield document


def _resized(data: Any, step: Step) -> Any:
    """Count the bytes that the block before took out of a text or added to it."""
    for document in data:
        size = utf8_size(document.text)
        step.rewritten += document.metadata["size"] - size
        document.metadata["size"] = size
        yield document


class LanguageId(BaseFilter):
    """Keeps one language, identified by py3langid, whose model is in its wheel."""

    name = "language"

    def __init__(self, language: str, min_score: float) -> None:
        super().__init__()
        self.language, self.min_score = language, min_score
        self._identifier = _language_identifier()

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        language, score = self._identifier.classify(doc.text)
        if language != self.language:
            return False, "other_language"
        return True if score >= self.min_score else (False, "uncertain_language")


@lru_cache(maxsize=1)
def _language_identifier() -> Any:
    """One model per process, because unpacking it takes half a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Toxicity(BaseFilter):
    """Drops toxic documents; scores a batch at a time, because a call costs more than a text."""

    name = "toxicity"

    def __init__(self, scorer: ToxicityScorer, threshold: float) -> None:
        super().__init__(batch_size=256)
        self.scorer, self.threshold = scorer, threshold

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        scores = self.scorer.scores([document.text for document in batch])
        return [True if score < self.threshold else (False, "toxic") for score in scores]


class UnwrapLines(BaseFilter):
    """Joins the lines of hard-wrapped paragraphs; drops nothing and keeps the length."""

    name = "unwrap"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        doc.text = re.sub(r"(?<=\S)\r?\n(?=\S)", " ", doc.text)
        return True


def quality_filters(limits: QualityThresholds, words: WordTokenizer) -> list[BaseFilter]:
    """The blocks of one quality profile in FineWeb's order: repetition, Gopher, C4, FineWeb."""
    language: Any = words  # datatrove takes a tokenizer wherever it takes a language
    blocks: list[BaseFilter] = [UnwrapLines()] if limits.unwrap_lines else []
    blocks.append(
        GopherRepetitionFilter(
            dup_line_frac=limits.max_duplicate_lines,
            dup_line_char_frac=limits.max_duplicate_line_characters,
            top_n_grams=limits.top_ngrams,  # pyright: ignore[reportArgumentType]
            dup_n_grams=limits.duplicate_ngrams,  # pyright: ignore[reportArgumentType]
            language=language,
        )
    )
    blocks.append(
        GopherQualityFilter(
            min_doc_words=limits.min_words,
            max_doc_words=limits.max_words,
            max_non_alpha_words_ratio=limits.min_alpha_fraction,
            language=language,
        )
    )
    if limits.c4:
        blocks.append(C4QualityFilter(filter_no_terminal_punct=False, language=language))
    blocks.append(
        FineWebQualityFilter(
            line_punct_thr=limits.min_punctuated_lines,
            short_line_thr=limits.max_short_lines,
            char_duplicates_ratio=limits.max_duplicate_characters,
            new_line_ratio=limits.max_newlines_per_word,
            language=language,
        )
    )
    return blocks


def word_tokenizer(config: CurateConfig) -> WordTokenizer:
    """The configured splitter; spaCy's costs seconds to import and is only loaded when asked for."""
    return load_word_tokenizer("eng") if config.word_splitter == "spacy" else RegexWordTokenizer()


def document_filters(config: CurateConfig, words: tuple[str, ...] = ()) -> dict[str, list[BaseFilter]]:
    """The steps that judge single documents, by their name in the ledger, in the order in which they run.

    A step without filters keeps everything and stays in the ledger. `words` is the list of toxicity=`word-list`.
    """
    scorer = toxicity_scorer(config.toxicity, words)
    return {
        "language": [LanguageId(config.language, config.min_language_score)],
        "quality": quality_filters(config.quality, word_tokenizer(config)),
        "toxicity": [Toxicity(scorer, config.toxicity_threshold)] if scorer else [],
    }
