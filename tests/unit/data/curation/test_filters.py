"""Each filter drops what it should, for the reason it says, and the account sees it."""

import tarfile
import zipfile
from collections import Counter
from typing import Any

import pytest
from datatrove.data import Document

from stages.config.curate import QUALITY_PROFILES, CurateConfig
from stages.data.curation.filters import Accounted, LanguageId, RegexWordTokenizer, quality_filters, word_tokenizer
from stages.data.curation.ledger import Step
from tests.places import SHARED

DATA = SHARED / "data"
_PROSE = (
    "The harbour was quiet when the last of the boats came in, and nobody on the quay spoke a word to the men who "
    "climbed out of it. They had been away for nine days. In that time the weather had changed twice, the price of "
    "herring had fallen, and the old lighthouse keeper had died in his sleep. His dog still sat before the door. "
    "Somebody would have to take it in before the winter, but it bit everyone who came near, and so it stayed."
)
_NUMBERS = " ".join(f"{word} {number} {number * number}" for number, word in enumerate(_PROSE.split()))


def _verdict(text: str, profile: str) -> str:
    document = Document(text=text, id="x")
    for block in quality_filters(QUALITY_PROFILES[profile], RegexWordTokenizer()):
        verdict: Any = block.filter(document)
        if verdict is not True:
            return verdict[1]
    return "kept"


@pytest.mark.parametrize("profile", ["web", "docs", "books"])
def test_prose_passes_every_profile(profile: str) -> None:
    assert _verdict(_PROSE, profile) == "kept"


@pytest.mark.parametrize(
    ("text", "profile", "reason"),
    [
        ("Too short to say anything.", "docs", "top_2_gram"),
        (" ".join(_PROSE.split()[:29]), "docs", "gopher_short_doc"),
        (" ".join(_PROSE.split()[:40]), "web", "gopher_short_doc"),
        ("The same line over and over again.\n" * 30, "docs", "dup_line_frac"),
        (
            " ".join(f"{word} {n} {n * n}" for n, word in enumerate(_PROSE.split())),
            "docs",
            "gopher_below_alpha_threshold",
        ),
        (_PROSE + " { a brace }", "web", "curly_bracket"),
        (_PROSE.removesuffix("."), "docs", "line_punct_ratio"),
    ],
)
def test_bad_text_is_dropped_for_its_reason(text: str, profile: str, reason: str) -> None:
    assert _verdict(text, profile) == reason


def test_web_thresholds_are_finewebs() -> None:
    limits = QUALITY_PROFILES["web"]
    assert limits.top_ngrams == ((2, 0.2), (3, 0.18), (4, 0.16))
    assert limits.duplicate_ngrams == ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    figures = (limits.min_words, limits.max_words, limits.min_alpha_fraction, limits.max_duplicate_lines)
    assert figures == (50, 100_000, 0.8, 0.3)
    lines = (limits.min_punctuated_lines, limits.max_short_lines, limits.max_duplicate_characters)
    assert lines == (0.12, 0.67, 0.01)
    assert limits.max_newlines_per_word == 0.3


def test_books_profile_unwraps_hard_lines() -> None:
    words = _PROSE.split()
    wrapped = "\n".join(" ".join(words[start : start + 4]) for start in range(0, len(words), 4))
    assert _verdict(wrapped, "web") == "line_punct_ratio" or _verdict(wrapped, "web") == "short_line_ratio"
    assert _verdict(wrapped, "books") == "kept"


def test_the_account_books_rewritten_bytes_and_reasons() -> None:
    step, planted = Step("quality"), dict[str, str]()
    kept_text = _PROSE.replace("twice", "twice[1]")
    documents = [
        Document(text=kept_text, id="a", metadata={"planted": ""}),
        Document(text="short", id="b", metadata={"planted": "x"}),
    ]
    filters = quality_filters(QUALITY_PROFILES["web"], RegexWordTokenizer())
    kept = list(Accounted(step, filters, 3, planted).run(iter(documents)))
    step.verify()
    assert [document.id for document in kept] == ["a"]
    assert step.rewritten == len("[1]")  # C4 takes out citation marks
    assert planted == {"b": "quality/gopher_short_doc"}


@pytest.mark.slow  # spaCy takes seconds to import
def test_regex_words_agree_with_spacy_on_the_verdict_of_prose() -> None:
    spacy = word_tokenizer(CurateConfig(word_splitter="spacy"))
    ours = RegexWordTokenizer()
    text = _PROSE + "See numpy.argsort(a, axis=-1) >>> x == y; the well-known rule is there, isn't it?"
    assert abs(len(ours.word_tokenize(text)) - len(spacy.word_tokenize(text))) <= 0.05 * len(spacy.word_tokenize(text))


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
def test_peps_are_kept_by_docs_and_hardly_any_by_web() -> None:
    with tarfile.open(DATA / "corpus" / "peps.tar.gz") as archive:
        members = [member for member in archive.getmembers() if member.isfile()][:40]
        peps = [archive.extractfile(member).read().decode() for member in members]  # type: ignore[union-attr]
    by_docs = Counter(_verdict(text, "docs") for text in peps)["kept"]
    by_web = Counter(_verdict(text, "web") for text in peps)["kept"]
    assert by_docs >= 28
    assert by_web <= 8


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
def test_one_text_in_many_languages_only_english_stays() -> None:
    block = LanguageId("en", 0.5)
    kept: list[str] = []
    with zipfile.ZipFile(DATA / "labels" / "udhr2.zip") as archive:
        for name in ("eng", "fra", "deu_1996", "spa", "ita", "nld", "rus", "cmn_hans", "pol", "por_PT", "swe", "tur"):
            member = f"udhr2/{name}.txt"
            if member in archive.namelist():
                text = archive.read(member).decode("utf-8", "replace")[:3000]
                kept += [name] if block.filter(Document(text=text, id=name)) is True else []
    assert kept == ["eng"]
