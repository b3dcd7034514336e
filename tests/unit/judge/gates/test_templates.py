"""The run asks as its given model is asked, as `tokenize` takes that model's template over."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.config.gate_records import Outcome
from stages.config.request import SourceEntry, SourceKind
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.tokenizer import train_tokenizer
from stages.judge.gates import reload, templates
from stages.models.given_tokenizer import given_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As TinyLlama's: without the begin token that the tokenizer itself puts before every text."""


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    return train_tokenizer(iter([str(TokenizeConfig.__doc__) + Path(__file__).read_text()]), config).backend


@pytest.fixture
def given(tmp_path: Path, backend: Tokenizer) -> Path:
    folder = tmp_path / "given-model"
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def checked(folder: Path, theirs: Any, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The check of a model that was trained from the folder with tokens of template `auto`."""
    manifest = SimpleNamespace(config={"chat_template": "auto"})
    monkeypatch.setattr(templates, "read_evidence", lambda ref: SimpleNamespace(manifest=manifest))
    source = SourceEntry(role="base_model", kind=SourceKind.MODEL, uri=str(folder), digest="d")
    tokens = SimpleNamespace(role="tokens", ref=lambda: None)
    trained: Any = SimpleNamespace(inputs=(tokens,), sources=(source,))
    (check,) = templates.given_template(trained, theirs, scratch)
    return check


def test_a_template_that_got_the_begin_token_is_still_the_given_one(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given_tokenizer(given).save(tmp_path / "tokens")
    theirs = reload.published_tokenizer(tmp_path / "tokens")
    assert theirs.chat_template == "{{ bos_token }}" + TEMPLATE
    check = checked(given, theirs, tmp_path, monkeypatch)
    assert (check.name, check.outcome) == ("given_template", Outcome.PASSED)


def test_another_template_than_the_given_one_is_found(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given_tokenizer(given).save(tmp_path / "tokens")
    theirs = reload.published_tokenizer(tmp_path / "tokens")
    theirs.chat_template = theirs.chat_template.replace("<|assistant|>", "<|user|>")
    check = checked(given, theirs, tmp_path, monkeypatch)
    assert check.outcome is Outcome.FAILED
    assert "the run gives" in check.found


def test_a_given_model_that_is_gone_cannot_be_asked(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs = reload.published_tokenizer(given)
    check = checked(tmp_path / "gone", theirs, tmp_path, monkeypatch)
    assert check.outcome is Outcome.SKIPPED
    assert check.found.startswith("the given model cannot be asked: ")
