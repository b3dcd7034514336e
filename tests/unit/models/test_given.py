"""A base model that is not there, is no model, or has another tokenizer is refused with a sentence."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import httpx
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.config.errors import ConfigError
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.tokenizer import LoadedTokenizer, train_tokenizer
from stages.data.tokens.views import TokensArtifact
from stages.models.build import _load, load_causal_lm, load_reward_model, save_model
from stages.models.foreign_code import code_digest
from stages.models.given import base_model_dir, snapshot_base_model
from stages.models.given_tokenizer import given_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    return train_tokenizer(iter([str(TokenizeConfig.__doc__) + Path(__file__).read_text()]), config).backend


def save(folder: Path, tokenizer: Tokenizer | None, *, vocab_size: int = 300, template: str | None = None) -> Path:
    """A model as a user would bring it: written by transformers alone."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer is not None:
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>")
        made.chat_template = template
        made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("uri", ["/nowhere/at/all", "file:///nowhere", "file:///nowhere/artifacts/base-model/abc"])
def test_a_model_that_is_not_there_is_named(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base_model='.*' does not exist"):
        snapshot_base_model(uri)
    with pytest.raises(ConfigError, match=r"base_model='.*' does not exist"):
        base_model_dir(uri, tmp_path)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        snapshot_base_model(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = save(tmp_path, tokenizer)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        base_model_dir(str(folder), tmp_path)


CODE = """
import pathlib
pathlib.Path({sign!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
from .layers import TwiceAsLoud

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm = TwiceAsLoud(config.hidden_size)
"""
LAYERS = """
from transformers.models.llama.modeling_llama import LlamaRMSNorm

class TwiceAsLoud(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


def bring_code(folder: Path, *, sign: Path, auto_map: dict[str, str] = AUTO_MAP) -> Path:
    """Turn a saved model into one of an architecture of its own, in two files, that leaves a sign when it runs."""
    (folder / "own.py").write_text(CODE.format(sign=str(sign)))
    (folder / "layers.py").write_text(LAYERS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    return folder


@pytest.fixture
def with_code(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return bring_code(save(tmp_path / "model", tokenizer), sign=tmp_path / "ran")


def tokens_of(tokenizer: LoadedTokenizer, folder: Path) -> TokensArtifact:
    """A `tokens` artifact without data: what loading and saving a model reads of one."""
    tokenizer.save(folder / "tokenizer")
    special = {"pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id, "bos_id": tokenizer.bos_id}
    (folder / "meta.json").write_text(json.dumps({"sequence_length": 64, "vocab_size": 300, **special}))
    return TokensArtifact(folder)


LOADERS = [
    lambda folder: base_model_dir(str(folder), folder.parent),
    given_tokenizer,
    partial(_load, AutoModelForCausalLM),
]


@pytest.mark.parametrize("load", LOADERS)
def test_code_that_comes_with_a_model_is_refused_and_the_error_says_how_to_allow_it(load, with_code: Path) -> None:
    with pytest.raises(ConfigError, match=r"brings code of its own for model_type='own'") as refused:
        load(with_code)
    assert f"ATHANOR_ALLOW_REMOTE_CODE={code_digest(with_code)}" in refused.value.advice
    assert not (with_code.parent / "ran").exists()


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("changed", ["own.py", "layers.py", "another.py"])
def test_allowed_code_runs_and_changed_code_does_not(
    load, changed: str, with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATHANOR_ALLOW_REMOTE_CODE", f"{'0' * 64}, {code_digest(with_code)}")
    with (with_code / changed).open("a") as file:
        file.write("\nOTHER = 1\n")
    with pytest.raises(ConfigError, match="does not run"):
        load(with_code)
    assert not (with_code.parent / "ran").exists()
    monkeypatch.setenv("ATHANOR_ALLOW_REMOTE_CODE", code_digest(with_code))
    load(with_code)


@pytest.mark.parametrize("entry", ["*", "true", "org/name", "org/name@main", f"org/name@{'0' * 40}", "0" * 63])
def test_what_pins_no_code_is_no_permission(entry: str, with_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_ALLOW_REMOTE_CODE", entry)
    with pytest.raises(ConfigError, match=rf"ATHANOR_ALLOW_REMOTE_CODE holds \['{re.escape(entry)}'\]"):
        _load(AutoModelForCausalLM, with_code)
    assert not (with_code.parent / "ran").exists()


def test_code_of_another_repository_never_runs(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {**AUTO_MAP, "AutoModelForCausalLM": "org/other--own.OwnForCausalLM"}
    folder = bring_code(save(tmp_path / "model", tokenizer), sign=tmp_path / "ran", auto_map=elsewhere)
    monkeypatch.setenv("ATHANOR_ALLOW_REMOTE_CODE", code_digest(folder))
    with pytest.raises(ConfigError, match="wants code of another repository"):
        _load(AutoModelForCausalLM, folder)
    assert not (tmp_path / "ran").exists()


def test_a_model_made_from_one_with_allowed_code_brings_the_same_code_and_loads(
    with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATHANOR_ALLOW_REMOTE_CODE", code_digest(with_code))
    tokens = tokens_of(given_tokenizer(with_code), tmp_path / "tokens")
    model = load_causal_lm(with_code, tokens)
    assert (tmp_path / "ran").exists()
    assert type(model).__name__ == "OwnForCausalLM"
    made = tmp_path / "made"
    made.mkdir()
    save_model(model, dict(model.state_dict()), made, tokens)
    assert code_digest(made) == code_digest(with_code)
    again = load_causal_lm(made, tokens)
    ids = torch.arange(20, 40)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(ConfigError, match="makes no AutoModelForSequenceClassification"):
        load_reward_model(made, tokens)
    monkeypatch.delenv("ATHANOR_ALLOW_REMOTE_CODE")
    with pytest.raises(ConfigError, match="does not run"):
        load_causal_lm(made, tokens)


def test_the_digest_of_a_model_with_code_follows_the_code(with_code: Path) -> None:
    before = snapshot_base_model(str(with_code))
    (with_code / "layers.py").write_text(LAYERS.replace("2 *", "3 *"))
    assert snapshot_base_model(str(with_code)) != before


def test_a_known_architecture_is_loaded_with_the_librarys_code_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = save(tmp_path, tokenizer)
    (folder / "own.py").write_text(CODE.format(sign=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "own.OwnConfig"}}))
    assert base_model_dir(str(folder), tmp_path) == folder
    model, _ = _load(AutoModelForCausalLM, folder)
    assert type(model) is LlamaForCausalLM
    assert not list(tmp_path.rglob("ran"))


class Runs:
    """What a pickle can do."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple:
        return Path.touch, (self.sign,)


def test_a_pickle_among_safetensors_is_not_opened(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = save(tmp_path / "model", tokenizer)
    pickle = folder / "pytorch_model.bin"
    torch.save({"a": Runs(tmp_path / "ran")}, pickle)
    _load(AutoModelForCausalLM, folder)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": pickle.name}}  # an index that leads to it
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"names \['pytorch_model\.bin'\]"):
        _load(AutoModelForCausalLM, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__['os'].system('touch ran') }}",
        "{% include '/etc/passwd' %}",
        "{{ self._TemplateReference__context.environment }}{{ cycler.__init__.__globals__.os.getcwd() }}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(template: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = save(tmp_path, tokenizer, template="{% generation %}" + template + "{% endgeneration %}")
    with pytest.raises(ConfigError, match="chat template"):
        given_tokenizer(folder).chat().check()


def test_the_digest_follows_the_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = save(tmp_path, tokenizer)
    before = snapshot_base_model(str(folder))
    assert snapshot_base_model(str(folder)) == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert snapshot_base_model(str(folder)) != before


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        given_tokenizer(save(tmp_path, None))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has 300 entries, the model embeds 200"):
        given_tokenizer(save(tmp_path, tokenizer, vocab_size=200))


def test_a_plain_base_model_gets_a_template_of_plain_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loaded = given_tokenizer(save(tmp_path, tokenizer))
    assert "generation" in loaded.chat_template
    assert loaded.eos_id == tokenizer.token_to_id("<|end|>")
    assert loaded.pad_id == loaded.eos_id


UNMARKED = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_of_its_own_is_kept_and_gets_the_begin_token_that_its_tokenizer_adds(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    bos = tokenizer.token_to_id("<|bos|>")
    assert tokenizer.encode("x").ids[0] == bos
    folder = save(tmp_path, tokenizer, template=UNMARKED)
    with pytest.raises(ConfigError, match=r"no \{% generation %\} markers"):
        given_tokenizer(folder, chat_template="own").chat().check()
    loaded = given_tokenizer(folder)
    assert loaded.chat_template == "{{ bos_token }}" + UNMARKED
    assert loaded.chat().check() == loaded.eos_id
    ids = loaded.chat().encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).ids
    assert (ids == bos).nonzero()[0].tolist() == [0]
    loaded.save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert list(saved.apply_chat_template(turns)["input_ids"]) == ids.tolist()


def test_a_template_given_as_text_takes_the_place_of_the_tokenizers_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    marked = UNMARKED.replace(
        "{{ m['content'] }}<|end|>", "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    )
    loaded = given_tokenizer(save(tmp_path, tokenizer, template=UNMARKED), chat_template=marked)
    assert loaded.chat_template == "{{ bos_token }}" + marked  # this tokenizer begins every text with it
    assert "Assistant:" in given_tokenizer(save(tmp_path, tokenizer), chat_template="plain").chat_template


def test_only_files_that_a_tokenizer_reads_are_blamed_for_a_broken_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = save(tmp_path, tokenizer)
    (folder / "added_notes.json").write_text('["no setting of anything"]')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": 7}')
    with pytest.raises(ConfigError, match="no tokenizer in") as caught:
        given_tokenizer(folder)
    assert "added_notes" not in caught.value.message


def test_a_library_that_is_not_installed_is_told_as_such(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("this model needs timm")

    folder = save(tmp_path, tokenizer)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(ConfigError, match=r"a library that is not installed: .* needs timm"):
        _load(AutoModelForCausalLM, folder)


def test_a_reward_models_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_reward_model(tmp_path, TokensArtifact.__new__(TokensArtifact))


def test_a_repository_with_terms_to_accept_is_not_told_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: object, **__: object) -> None:
        raise GatedRepoError("terms", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", gated)
    with pytest.raises(ConfigError, match="accept its terms") as caught:
        snapshot_base_model("org/gated")
    assert "HF_TOKEN" in caught.value.advice


@pytest.mark.parametrize("address", ["models:/x", "models:/", "models:/x@", "models:/x/"])
def test_an_address_of_no_registered_model_is_told_in_a_sentence(address: str, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=f"{address!r} names no version") as caught:
        snapshot_base_model(address)
    assert "<alias>" in caught.value.advice
