"""In which language a text is, by the classifier that curation uses."""

from stages.data.synthesis.filters import IsInLanguage


def language_check(language: str, min_score: float) -> IsInLanguage:
    """Return whether a text is in the language, with this confidence at least."""
    from datatrove.data import Document

    from stages.data.curation.filters import LanguageId

    block = LanguageId(language, min_score)
    return lambda text: block.filter(Document(text=text, id="")) is True
