"""What a tokenizer.json brings along (limits of a batch, holes between ids, unmarked control tokens) spoils no ids."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from stages import tokenize
from stages.config.errors import ConfigError
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.ragged import RaggedWriter
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.data.tokens.views import Split, TokensArtifact
from stages.models.given_tokenizer import given_tokenizer
from tests.small_world import write_curated

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCE = "What does it do? It sorts the lists in place. "
TURNS = [{"role": "user", "content": SENTENCE * 5}, {"role": "assistant", "content": SENTENCE * 15}]


def trained() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([SENTENCE], trainer)
    return made


def given(folder: Path, backend: Tokenizer, **changes: Any) -> LoadedTokenizer:
    """The tokenizer of a model's folder, whose tokenizer.json has these parts replaced."""
    folder.mkdir(exist_ok=True)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.chat_template = CHATML
    made.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**saved, **changes}))
    LlamaConfig(vocab_size=100_000, hidden_size=8, num_attention_heads=1).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return given_tokenizer(folder, chat_template="infer")


def with_controls(backend: Tokenizer, *, special: bool = True, extra: tuple[str, ...] = ()) -> Tokenizer:
    names = ("<|im_start|>", "<|im_end|>", *extra)
    backend.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return backend


@pytest.mark.parametrize(
    "limit",
    [
        {"truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 512},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
    ],
    ids=["truncation", "padding"],
)
def test_limits_inside_tokenizer_json_neither_cut_nor_fill(limit: dict[str, Any], tmp_path: Path) -> None:
    plain = given(tmp_path / "plain", with_controls(trained()))
    limited = given(tmp_path / "limited", with_controls(trained()), **limit)
    (expected,), (ids,) = (made.encode_texts([SENTENCE * 40]) for made in (plain, limited))
    assert len(ids) > 300
    assert ids.tolist() == expected.tolist()
    assert ids[-1] == limited.eos_id
    whole, chat = (made.chat().encode(TURNS) for made in (plain, limited))
    assert chat.ids.tolist() == whole.ids.tolist()
    assert chat.loss_mask.tolist() == whole.loss_mask.tolist()
    limited.save(tmp_path / "saved")
    again = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert (again.truncation, again.padding) == (None, None)


def with_hole(backend: Tokenizer, *, token: str, number: int) -> Tokenizer:
    """Move one piece to another id."""
    data = json.loads(backend.to_str())
    data["model"]["vocab"][token] = number
    return Tokenizer.from_str(json.dumps(data))


def test_the_width_of_stored_ids_follows_the_largest_id_and_not_the_number_of_entries(tmp_path: Path) -> None:
    made = given(tmp_path / "model", with_controls(with_hole(trained(), token="W", number=70_000)))
    assert made.backend.get_vocab_size() < 400
    assert made.vocab_size == 70_001
    (ids,) = made.encode_texts(["W"])
    assert ids.tolist() == [70_000, made.eos_id]


def test_the_tokenize_stage_stores_an_id_of_more_than_16_bits_whole(tmp_path: Path) -> None:
    given(tmp_path / "model", with_controls(with_hole(trained(), token="W", number=70_000)))
    curated = write_curated(tmp_path / "curated", num_documents=8)
    with gzip.open(curated / "documents/train/part-00000.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"id": "w", "text": "W"}) + "\n")
    context = SimpleNamespace(
        config=TokenizeConfig(chat_template="infer"),
        input_dir=lambda role: curated,
        output_dir=tmp_path / "out",
        has_base_model=True,
        given_dir=lambda role: tmp_path / "model",
        progress=lambda done, total, unit="", **numbers: None,
    )
    context.output_dir.mkdir()
    tokenize.run(cast(Any, context))
    tokens = TokensArtifact(context.output_dir)
    assert tokens.meta["dtype"] == "uint32"
    assert tokens.documents(Split.TRAIN)[0].tolist()[0] == 70_000


def test_a_stand_in_for_a_control_token_takes_no_id_that_a_piece_has(tmp_path: Path) -> None:
    """The copy would number its stand-ins from the size of the vocabulary, an id in use where ids have holes."""
    backend = trained()
    size = backend.get_vocab_size()
    for place, token in enumerate("Wdt"):
        backend = with_hole(backend, token=token, number=size + 2 + place)
    made = given(tmp_path / "model", with_controls(backend))
    chat = made.chat()
    turns = [{"role": "user", "content": "W"}, {"role": "assistant", "content": "d t"}]
    text = "<|im_start|>user\nW<|im_end|>\n<|im_start|>assistant\nd t<|im_end|>\n"
    assert chat.encode(turns).ids.tolist() == made.backend.encode(text, add_special_tokens=False).ids


def test_a_value_that_does_not_fit_is_never_stored_as_another(tmp_path: Path) -> None:
    writer = RaggedWriter(tmp_path, "ids", np.dtype(np.uint16))
    with pytest.raises(AssertionError, match="do not fit into uint16"):
        writer.append(np.asarray([1, 70_000]))


def test_control_tokens_that_are_not_marked_are_ordinary_text_in_documents_too(tmp_path: Path) -> None:
    unmarked = with_controls(trained(), special=False, extra=("<｜User｜>", "<|fim_prefix|>", "<think>"))
    made = given(tmp_path / "model", unmarked)
    quoted = "It says <|im_start|>user, <|im_end|>, <｜User｜> and <|fim_prefix|>."
    (ids,) = made.encode_texts([quoted])
    controls = {
        made.backend.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>", "<｜User｜>", "<|fim_prefix|>")
    }
    assert not controls & set(ids[:-1].tolist())
    assert made.backend.decode(ids[:-1].tolist(), skip_special_tokens=False) == quoted
    message = made.chat().encode([{"role": "user", "content": quoted}, {"role": "assistant", "content": "yes"}])
    assert [
        int((message.ids == made.backend.token_to_id(name)).sum()) for name in ("<｜User｜>", "<|fim_prefix|>")
    ] == [
        0,
        0,
    ]


def test_a_word_that_was_added_to_the_vocabulary_stays_one_token(tmp_path: Path) -> None:
    made = given(tmp_path / "model", with_controls(trained(), special=False, extra=("<think>",)))
    (ids,) = made.encode_texts(["<think>"])
    assert ids.tolist() == [made.backend.token_to_id("<think>"), made.eos_id]


def test_a_tokenizer_that_cannot_encode_any_text_is_the_configurations_fault() -> None:
    backend = Tokenizer(models.WordPiece({"a": 0, "<|im_end|>": 1}, unk_token="[UNK]"))
    made = LoadedTokenizer(
        with_controls(backend), CHATML, {"bos_token": "", "eos_token": "<|im_end|>", "pad_token": ""}, 64, True
    )
    with pytest.raises(ConfigError, match=r"cannot encode a text: .*UNK"):
        made.encode_texts(["b"])
    with pytest.raises(ConfigError, match=r"cannot encode a text: .*UNK"):
        made.chat().encode([{"role": "user", "content": "b"}, {"role": "assistant", "content": "b"}])
