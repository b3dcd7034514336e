"""Token shards hold what the text said; what does not fit is counted; a vocabulary that is too large is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from stages import tokenize
from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError, DataError
from stages.config.graph import Stage
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.encoding import Account
from stages.data.tokens.ragged import Ragged, RaggedWriter
from stages.data.tokens.views import Split, TokensArtifact
from stages.job.context import StageOutcome
from tests.small_world import make_context, published, write_curated

CONFIG = TokenizeConfig(vocab_size=300, sequence_length=64, max_prompt_length=32, bpe_train_bytes=10_000)


def run(
    home: Path, config: TokenizeConfig = CONFIG, **extra: list[dict[str, Any]]
) -> tuple[StageOutcome, TokensArtifact]:
    """Tokenize the small world with further rows in `instructions` and `preferences`."""
    curate = make_context(home, Stage.CURATE, CurateConfig())
    write_curated(curate.output_dir)
    for part, rows in extra.items():
        with gzip.open(curate.output_dir / part / "train.jsonl.gz", "at", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    context = make_context(home, Stage.TOKENIZE, config, {"curated": published(curate)})
    outcome = tokenize.run(context)
    return outcome, TokensArtifact(context.output_dir)


def conversation(*texts: str, source: str = "chat") -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"messages": messages, "group": source, "origin": "given"}


def pair(chosen: str, rejected: str, *earlier: str) -> dict[str, Any]:
    prompt = conversation(*(earlier or ("why?",)))["messages"]
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, **sides, "kind": "given", "group": "pairs", "origin": "given"}


def test_documents_come_back_as_they_were_between_begin_and_end(tmp_path: Path) -> None:
    outcome, tokens = run(tmp_path)
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_dir / "tokenizer.json"))
    with gzip.open(tmp_path / "work/curate/output/documents/train/part-00000.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    documents = tokens.documents(Split.TRAIN)
    assert len(documents) == len(texts)
    for index, text in enumerate(texts):
        ids = documents[index]
        assert (ids[0], ids[-1]) == (tokens.bos_id, tokens.eos_id)
        assert tokenizer.decode(ids[1:-1].tolist()) == text
    ledger = outcome.ledger["train"]["documents"]
    assert ledger["bytes"] == sum(len(text.encode()) for text in texts)
    assert ledger["tokens"] == documents.num_items == documents.lengths.sum()


def test_what_does_not_fit_is_counted_by_reason_in_rows_and_tokens(tmp_path: Path) -> None:
    long = "word " * 100
    outcome, tokens = run(
        tmp_path,
        instructions=[conversation(long, "short"), conversation("short", long)],
        preferences=[pair("the same", "the same"), pair("fine", long)],
    )
    conversations, preferences = (outcome.ledger["train"][part] for part in ("conversations", "preferences"))
    assert conversations["dropped.longer_than_context"] == 2
    assert conversations["in"] == conversations["kept"] + 2 == len(tokens.conversations(Split.TRAIN)) + 2
    assert preferences["dropped.equal_sides"] == 1
    assert preferences["dropped.longer_than_context"] == 1
    assert preferences["in"] == preferences["kept"] + 2
    assert conversations["tokens"] == tokens.conversations(Split.TRAIN).lengths.sum()
    for part in (conversations, preferences):
        lost = part["dropped_tokens.longer_than_context"] + part.get("dropped_tokens.equal_sides", 0)
        assert lost > 100
        assert part["tokens_in"] == part["target_tokens"] + part["masked_tokens"] + lost


def test_a_long_conversation_is_cut_behind_the_last_answer_that_fits(tmp_path: Path) -> None:
    long = "word " * 100
    rows = [conversation("a?", "b", "c?", "d", "e?", long), conversation("a?", long, "c?", "d")]
    rows[0]["messages"].insert(0, {"role": "system", "content": "be brief"})
    outcome, tokens = run(tmp_path, CONFIG.model_copy(update={"too_long": "truncate"}), instructions=rows)
    account = outcome.ledger["train"]["conversations"]["sources"]["chat"]
    assert (account["in"], account["kept"], account["cut"]) == (2, 1, 1)
    assert account["dropped.longer_than_context"] == 1
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_dir / "tokenizer.json"))
    last = tokens.conversations(Split.TRAIN)[len(tokens.conversations(Split.TRAIN)) - 1]
    said = tokenizer.decode(last.ids.tolist(), skip_special_tokens=False)
    kept = "<|user|>a?<|end|><|assistant|>b<|end|><|user|>c?<|end|><|assistant|>d<|end|>"
    assert said == f"<|bos|><|system|>be brief<|end|>{kept}"
    assert account["target_tokens"] == last.loss_mask.sum() == 4  # b, d and their ends
    assert account["masked_tokens"] == len(last.ids) - 4
    assert account["dropped_tokens.cut"] > 100
    assert account["tokens_in"] == len(last.ids) + sum(
        count for name, count in account.items() if name.startswith("dropped_tokens.")
    )


def test_a_long_question_is_trained_on_and_not_asked_in_ppo(tmp_path: Path) -> None:
    question = "xyz" * 12  # 36 tokens, for the text that the tokenizer learned from has none of it
    outcome, tokens = run(tmp_path, instructions=[conversation(question, "b"), conversation("q", "b"),
                                                  conversation("q", "c")])  # fmt: skip
    assert outcome.ledger["train"]["conversations"]["sources"]["chat"]["kept"] == 3
    prompts = outcome.ledger["train"]["prompts"]
    assert prompts["dropped.prompt_too_long"] == 1
    assert prompts["in"] == prompts["kept"] + prompts["dropped.repeated"] + 1
    assert len(tokens.prompts(Split.TRAIN)) == prompts["kept"]
    assert tokens.prompts(Split.TRAIN).lengths.max() <= 32


def test_each_row_is_known_by_its_source(tmp_path: Path) -> None:
    rows = [conversation("q", "a", source="one"), conversation("q", "b", source="two"), conversation("r", "c")]
    _, tokens = run(tmp_path, instructions=rows, preferences=[pair("x", "y")])
    sources = tokens.conversation_sources(Split.TRAIN)
    assert sources.names == ("derived", "one", "two", "chat")
    assert sources.indices[-3:].tolist() == [1, 2, 3]
    assert len(sources.indices) == len(tokens.conversations(Split.TRAIN))
    assert tokens.pair_sources(Split.TRAIN).names == ("derived", "pairs")


def test_tokens_that_do_not_add_up_fail_the_stage() -> None:
    account = Account()
    account.count("s", **{"in": 1})
    account.drop("s", "longer_than_context", tokens=7)
    assert account.to_dict("conversations")["dropped_tokens.longer_than_context"] == 7
    account.count("s", tokens_in=1)
    with pytest.raises(DataError, match="8 tokens came in, 1 and 7 are accounted for"):
        account.to_dict("conversations")


def test_earlier_assistant_turns_are_not_trained_as_answers_of_a_pair(tmp_path: Path) -> None:
    row = pair("yes", "no", "a", "b", "c")
    _, tokens = run(tmp_path, preferences=[row])
    last = tokens.pairs(Split.TRAIN)[len(tokens.pairs(Split.TRAIN)) - 1].chosen
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_dir / "tokenizer.json"))
    assert tokenizer.decode(last.ids[last.loss_mask == 1].tolist(), skip_special_tokens=False) == "yes<|end|>"


def test_a_vocabulary_that_the_text_does_not_support_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=60000 but the text supports only \d+ entries") as caught:
        run(tmp_path, CONFIG.model_copy(update={"vocab_size": 60_000}))
    assert "at most" in caught.value.advice


def test_the_text_that_the_tokenizer_learns_from_is_spread_evenly_over_the_documents(tmp_path: Path) -> None:
    (tmp_path / "documents" / "train").mkdir(parents=True)
    with gzip.open(tmp_path / "documents" / "train" / "00000.jsonl.gz", "wt") as file:
        for number in range(10):  # a line that is not taken is not even decoded
            file.write(json.dumps({"text": f"text {number}"}) + "\n" if number % 2 else "not JSON\n")
    (tmp_path / "ledger.json").write_text(json.dumps({"documents": {"published": {"train": {"bytes": 60}}}}))
    assert list(tokenize.evenly(tmp_path, 30)) == [f"text {number}" for number in (1, 3, 5, 7, 9)]


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    curate = make_context(tmp_path, Stage.CURATE, CurateConfig())
    write_curated(curate.output_dir, num_documents=0)
    context = make_context(tmp_path, Stage.TOKENIZE, CONFIG, {"curated": published(curate)})
    with pytest.raises(DataError, match="no training documents"):
        tokenize.run(context)


def test_text_shorter_than_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sequence_length=60000 but the training text has only \d+ tokens"):
        run(tmp_path, CONFIG.model_copy(update={"sequence_length": 60_000}))


def test_arrays_are_found_again_across_shards(tmp_path: Path) -> None:
    arrays = [np.arange(n) + 10 * n for n in (3, 5, 1, 0, 4)]
    writer = RaggedWriter(tmp_path, "x", np.dtype(np.uint16), shard_items=6)
    for values in arrays:
        writer.append(values)
    writer.close()
    assert len(list(tmp_path.glob("x-0*.npy"))) == 3
    ragged = Ragged(tmp_path, "x")
    assert [ragged[i].tolist() for i in range(len(ragged))] == [values.tolist() for values in arrays]
    assert ragged.slice(2, 9).tolist() == np.concatenate(arrays)[2:9].tolist()


def trained_texts(tokens: TokensArtifact, count: int) -> list[str]:
    """What the last rows train, decoded."""
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_dir / "tokenizer.json"))
    chats = tokens.conversations(Split.TRAIN)
    last = [chats[number] for number in range(len(chats) - count, len(chats))]
    return [tokenizer.decode(chat.ids[chat.loss_mask == 1].tolist(), skip_special_tokens=False) for chat in last]


@pytest.mark.parametrize(
    ("rule", "trained", "dropped"),
    [
        ("all", ["b<|end|>d<|end|>"], 3),
        ("last", ["d<|end|>", "d<|end|>"], 2),
        ("weight", ["b<|end|>d<|end|>", "d<|end|>", "b<|end|>"], 1),
    ],
)
def test_the_loss_of_each_turn_follows_the_setting_and_what_it_cannot_train_is_counted(
    rule: str, trained: list[str], dropped: int, tmp_path: Path
) -> None:
    rows = [conversation("a?", "b", "c?", "d") for _ in range(4)]
    for row, masked in zip(rows, ((), (1,), (3,), (1, 3)), strict=True):
        for number in masked:
            row["messages"][number]["weight"] = 0
    outcome, tokens = run(tmp_path, CONFIG.model_copy(update={"trained_turns": rule}), instructions=rows)
    account = outcome.ledger["train"]["conversations"]["sources"]["chat"]
    assert trained_texts(tokens, len(trained)) == trained
    assert (account["in"], account["kept"], account["dropped.untrained_turn"]) == (4, len(trained), dropped)
    assert account["tokens_in"] == account["target_tokens"] + account["masked_tokens"]


def test_thinking_is_kept_or_dropped_and_an_answer_of_nothing_else_is_counted(tmp_path: Path) -> None:
    rows = [conversation("a?", "<think>t</think>b"), conversation("c?", "<think>t</think>")]
    pairs = [pair("<think>t</think>x", "<think>u</think>y", "q?", "<think>v</think>w", "r?")]
    kept, dropped = (
        run(tmp_path / rule, CONFIG.model_copy(update={"thinking": rule}), instructions=rows, preferences=pairs)
        for rule in ("keep", "drop")
    )
    inline = "<think>\nt\n</think>\n\n"
    assert trained_texts(kept[1], 2) == [f"{inline}b<|end|>", f"{inline}<|end|>"]
    assert trained_texts(dropped[1], 1) == ["b<|end|>"]
    assert dropped[0].ledger["train"]["conversations"]["sources"]["chat"]["dropped.empty_response"] == 1
    for (_, tokens), said in ((kept, f"{inline}x<|end|>"), (dropped, "x<|end|>")):
        tokenizer = Tokenizer.from_file(str(tokens.tokenizer_dir / "tokenizer.json"))
        folder = tokens.folder / "preferences" / "train"
        chosen, mask = (Ragged(folder, f"chosen-{part}") for part in ("ids", "mask"))
        ids = np.asarray(chosen[len(chosen) - 1])[np.asarray(mask[len(mask) - 1]) == 1]
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == said


def test_calls_that_our_own_template_leaves_out_are_counted(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    row = conversation("a?", "")
    row["messages"][1]["tool_calls"] = [call]
    described = {**conversation("a?", "b"), "tools": [{"type": "function", "function": {"name": "add"}}]}
    outcome, _ = run(tmp_path, instructions=[row, described])
    account = outcome.ledger["train"]["conversations"]["sources"]["chat"]
    assert (account["in"], account["kept"], account["dropped.tools_left_out_by_template"]) == (2, 0, 2)


def test_auto_is_own_where_the_tokenizer_is_trained_and_artifacts_made_before_stay_hits() -> None:
    assert TokenizeConfig().identity() == TokenizeConfig(chat_template="own").identity()
    given, marked = TokenizeConfig(base_model="/model"), TokenizeConfig(base_model="/model", chat_template="own")
    assert given.identity() != marked.identity()
    assert "thinking" not in TokenizeConfig().identity()
