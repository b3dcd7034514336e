"""What `curate` reads, keeps and holds out; every field changes the result; resources are set elsewhere."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.config.base import AddedLater, Config
from stages.config.graph import makers_of
from stages.config.pii import PiiConfig
from stages.config.sources import DERIVED, InstructionFormat, PreferenceFormat, PromptFormat, Source, parse_sources

INSTALLED_DOCS = "installed-docs"
NEW_BYTES, NEW_PAIRS = "curate/bytes_new", "curate/pairs_new"
"""Metrics of a curation that builds on previous data: new training text, and new pairs of both kinds and splits."""


class QualityThresholds(Config):
    """Limits of the Gopher, C4 and FineWeb quality filters (https://arxiv.org/abs/2112.11446, 2406.17557)."""

    min_words: int
    """Minimum words in a document, not counting punctuation."""
    max_words: int
    """Maximum words in a document."""
    min_alpha_fraction: float
    """Minimum share of words (punctuation counts as a word) with at least one letter."""
    top_ngrams: tuple[tuple[int, float], ...]
    """(n, maximum share of the characters that the most common n-gram may cover)."""
    duplicate_ngrams: tuple[tuple[int, float], ...]
    """(n, maximum share of the characters inside repeated n-grams)."""
    max_duplicate_lines: float
    """Maximum share of lines that repeat an earlier one."""
    max_duplicate_line_characters: float
    """Maximum share of characters in lines that repeat an earlier one, by Gopher's rule."""
    min_punctuated_lines: float
    """Minimum share of lines that end in terminal punctuation."""
    max_short_lines: float
    """Maximum share of lines of at most 30 characters."""
    max_duplicate_characters: float
    """Maximum share of characters in repeated lines by FineWeb's rule, which is stricter."""
    max_newlines_per_word: float
    """Maximum line breaks per word."""
    c4: bool
    """Whether C4's rules apply (they also rewrite the text: short and policy lines and [1]-style citations go)."""
    unwrap_lines: bool
    """Whether hard-wrapped paragraphs are joined to one line before the other rules look at lines."""


_DUPLICATE_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))

QUALITY_PROFILES: dict[str, QualityThresholds] = {
    # FineWeb as published: datatrove examples/fineweb.py with the blocks' defaults.
    "web": QualityThresholds(
        min_words=50,
        max_words=100_000,
        min_alpha_fraction=0.8,
        top_ngrams=((2, 0.20), (3, 0.18), (4, 0.16)),
        duplicate_ngrams=_DUPLICATE_NGRAMS,
        max_duplicate_lines=0.3,
        max_duplicate_line_characters=0.2,
        min_punctuated_lines=0.12,
        max_short_lines=0.67,
        max_duplicate_characters=0.01,
        max_newlines_per_word=0.3,
        c4=True,
        unwrap_lines=False,
    ),
    # Reference pages of software: names, signatures and lists count as good text, and a class with its methods repeats
    # lines by nature (Parameters, Returns, and arguments that many methods share).
    "docs": QualityThresholds(
        min_words=30,
        max_words=100_000,
        min_alpha_fraction=0.5,
        top_ngrams=((2, 0.25), (3, 0.25), (4, 0.25)),
        duplicate_ngrams=((5, 0.30), (6, 0.30), (7, 0.30), (8, 0.30), (9, 0.30), (10, 0.30)),
        max_duplicate_lines=0.6,
        max_duplicate_line_characters=0.3,
        min_punctuated_lines=0.05,
        max_short_lines=0.9,
        max_duplicate_characters=0.25,
        max_newlines_per_word=0.5,
        c4=False,
        unwrap_lines=False,
    ),
    # Prose, often hard-wrapped and full of dialogue: punctuation counts as words, so fewer words have letters.
    "books": QualityThresholds(
        min_words=50,
        max_words=5_000_000,
        min_alpha_fraction=0.7,
        top_ngrams=((2, 0.20), (3, 0.18), (4, 0.16)),
        duplicate_ngrams=_DUPLICATE_NGRAMS,
        max_duplicate_lines=0.3,
        max_duplicate_line_characters=0.2,
        min_punctuated_lines=0.12,
        max_short_lines=0.67,
        max_duplicate_characters=0.05,
        max_newlines_per_word=0.3,
        c4=False,
        unwrap_lines=True,
    ),
}


class CurateConfig(Config):
    """Settings of the `curate` stage."""

    documents: tuple[str, ...] = (INSTALLED_DOCS,)
    """Text sources: `installed-docs`, a file, a folder, `s3://bucket/prefix` (.txt .md .rst .jsonl .json .parquet
    .csv .tsv .arrow .feather, .gz and .zst), or `hf://name?split=train&config=..&text=..&revision=..`; empty for none,
    where nothing is pretrained and no pairs are derived."""
    instructions: tuple[str, ...] = (DERIVED,)
    """Instruction sources: `derived` (from installed-docs), files, folders, s3:// or hf:// of conversations; the
    format is detected from the fields, or named by `#format=alpaca` after the source (docs/DATA.md); empty for none."""
    preferences: tuple[str, ...] = (DERIVED,)
    """Preference sources: `derived`, files, folders, s3:// or hf:// of pairs, transcripts or ranked responses; the
    format is detected from the fields, or named by `#format=ranked` after the source (docs/DATA.md). Single responses
    with a label, which only the loss `kto` trains on, are named by `#format=unpaired`. Empty for none."""
    prompts: Annotated[tuple[str, ...], AddedLater(())] = ()
    """Sources of prompt sets, which have no answers but references or tests to judge responses by: files, folders,
    s3:// or hf://; the format is detected from the fields, or named by `#format=gsm8k` (docs/SCORERS.md); empty for
    none."""
    packages: tuple[str, ...] = ()
    """Distributions read by `installed-docs`; empty for every installed one."""
    exclude_packages: tuple[str, ...] = ("kubernetes", "kubernetes-asyncio")
    """Distributions that `installed-docs` leaves out (by default the generated kubernetes clients)."""
    include_stdlib: bool = False
    """Whether `installed-docs` also reads Python's standard library."""
    text_field: str = "text"
    """Name of the text column in document sources of rows (JSONL, JSON, Parquet, CSV, Arrow)."""
    max_bytes: int = Field(default=0, ge=0)
    """Maximum bytes (UTF-8) of documents that go into the filters, drawn by `seed` and document id; 0 for no limit."""
    max_bad_fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    """Largest share (0..1) of unreadable records in any one source before the stage fails."""
    heldout_packages: tuple[str, ...] = ()
    """Distributions whose documents and pairs are held out for evaluation."""
    heldout_fraction: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Share (0..1) held out, by hash of file or row, of sources that have no `heldout_packages`."""
    profile: Literal["web", "docs", "books"] = "docs"
    """Quality thresholds: FineWeb's (`web`), technical documentation (`docs`) or prose (`books`)."""
    word_splitter: Literal["regex", "spacy"] = "regex"
    """How the quality filters count words: a regular expression, or spaCy as FineWeb does (about 10 times slower)."""
    language: str = Field(default="en", pattern=r"^[a-z]{2,3}$")
    """Language to keep, as ISO 639 code."""
    min_language_score: float = Field(default=0.5, ge=0.0, le=1.0)
    """Minimum confidence (0..1) of the language classifier; FineWeb uses 0.65."""
    toxicity: Literal["classifier", "word-list", "none"] = "classifier"
    """How toxic text is found: a linear classifier, hits of a word list, or not at all."""
    toxicity_threshold: float = Field(default=0.95, gt=0.0, le=1.0)
    """Score (0..1) from which a text counts as toxic; a word list scores 1 - 0.5^hits."""
    toxicity_word_list: str = ""
    """File or s3:// object with one word or phrase a line, for toxicity=`word-list`."""
    scrub_pii: bool = True
    """Whether personal data and secrets become placeholders such as <EMAIL>; `pii` says which types."""
    pii: Annotated[PiiConfig, AddedLater(PiiConfig())] = PiiConfig()
    near_duplicates: bool = True
    """Whether near duplicates (MinHash) are removed in addition to exact ones."""
    minhash_ngram: int = Field(default=5, gt=0)
    """Words per shingle."""
    minhash_buckets: int = Field(default=14, gt=0)
    """Number of bands; more find more."""
    minhash_hashes: int = Field(default=8, gt=0)
    """Hashes per band; more find less. 14 x 8 finds 92 % of pairs with similarity 0.8."""
    planted: int = Field(default=6, ge=0)
    """Labelled planted documents per kind that measure the filters; none of them is published. 0 for none."""
    max_instructions: int = Field(default=20_000, ge=0)
    """Maximum training conversations, shared equally among the sources; what one does not need goes to the others."""
    max_preferences: int = Field(default=12_000, ge=0)
    """Maximum training preference pairs, shared among the sources in the same way."""
    max_prompts: Annotated[int, AddedLater(20_000)] = Field(default=20_000, ge=0)
    """Maximum training prompts of prompt sets, shared among the sources in the same way."""
    max_heldout_pairs: int = Field(default=1_000, ge=0)
    """Maximum held-out conversations, maximum held-out preference pairs, and maximum held-out prompts of prompt sets,
    shared in the same way."""
    preference_mix: tuple[float, float, float, float] = (0.15, 0.25, 0.25, 0.35)
    """Shares of derived rejected answers: `mismatch`, `truncated`, `rambling`, `garbled`; they add up to 1."""
    samples_per_reason: int = Field(default=3, ge=0)
    """Dropped documents shown in the ledger for each reason."""
    seed: int = 0
    """Seed of caps, held-out fraction, planted documents and question templates."""

    @property
    def quality(self) -> QualityThresholds:
        """Thresholds of the chosen profile."""
        return QUALITY_PROFILES[self.profile]

    @property
    def instruction_sources(self) -> tuple[Source, ...]:
        """The instruction sources, parsed."""
        return parse_sources("instructions", self.instructions, InstructionFormat)

    @property
    def preference_sources(self) -> tuple[Source, ...]:
        """The preference sources, parsed."""
        return parse_sources("preferences", self.preferences, PreferenceFormat)

    @property
    def prompt_sources(self) -> tuple[Source, ...]:
        """The sources of prompt sets, parsed."""
        return parse_sources("prompts", self.prompts, PromptFormat)

    @property
    def outside_sources(self) -> dict[str, str]:
        """URI -> name of the first setting that asks for it, for every source whose content lies outside the
        pipeline, in the order of their use."""
        uris = {
            "documents": self.documents,
            "instructions": tuple(source.uri for source in self.instruction_sources),
            "preferences": tuple(source.uri for source in self.preference_sources),
            "prompts": tuple(source.uri for source in self.prompt_sources),
            "toxicity_word_list": (self.toxicity_word_list,) if self.toxicity == "word-list" else (),
        }
        roles: dict[str, str] = {}
        for role, named in uris.items():
            for uri in named:
                if uri != DERIVED and uri not in makers_of(role):
                    roles.setdefault(uri, role)
        return roles

    @model_validator(mode="after")
    def _consistent(self) -> "CurateConfig":
        if self.toxicity == "word-list" and not self.toxicity_word_list:
            raise ValueError("toxicity='word-list' needs toxicity_word_list; give a file or use 'classifier' or 'none'")
        if not self.scrub_pii and self.pii != PiiConfig():
            changed = sorted(name for name, value in self.pii if value != getattr(PiiConfig(), name))
            raise ValueError(f"pii: {changed} are set, but scrub_pii=false replaces nothing; leave them, or scrub")
        if not math.isclose(sum(self.preference_mix), 1.0, abs_tol=1e-6) or min(self.preference_mix) < 0:
            raise ValueError(f"preference_mix={self.preference_mix} must be four shares >= 0 that add up to 1")
        lines = {"documents": self.documents, "instructions": tuple(source.uri for source in self.instruction_sources)}
        lines |= {"preferences": tuple(source.uri for source in self.preference_sources)}
        for name, uris in {**lines, "prompts": tuple(source.uri for source in self.prompt_sources)}.items():
            if blank := [uri for uri in uris if not uri.strip()]:
                # An empty path would be the folder in which the job works.
                raise ValueError(
                    f"{name}={list(uris)} holds a blank source {blank[0]!r}; leave it out, or name a source"
                )
        outside = sorted(set(self.heldout_packages) - set(self.packages)) if self.packages else []
        if outside:
            raise ValueError(f"heldout_packages={outside} are not among packages; add them there or hold out others")
        if DERIVED in (source.uri for source in self.prompt_sources):
            raise ValueError(f"prompts: {DERIVED!r} is a source of instructions and preferences; name a set of prompts")
        sources_by_field = {
            "instructions": self.instruction_sources,
            "preferences": self.preference_sources,
            "prompts": self.prompt_sources,
        }
        for name, sources in sources_by_field.items():
            if optioned := [str(source) for source in sources if source.uri == DERIVED and str(source) != DERIVED]:
                raise ValueError(f"{name}: {optioned[0]!r} has options, but derived rows have one format; drop them")
            if name == "prompts" and (weighted := [source.uri for source in sources if source.weight is not None]):
                raise ValueError(f"prompts: {weighted} have a weight, and all prompts are asked alike; drop it")
            if weighted := [source.uri for source in sources if source.weight is not None]:
                raise ValueError(
                    f"curate.{name}: {weighted} have a weight, on which curation does not depend; give it under the "
                    f"run's {name}, or as mixture of the stages that train"
                )
        return self
