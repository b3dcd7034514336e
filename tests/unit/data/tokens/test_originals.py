"""The texts behind a tokens artifact are found row by row, or not believed."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from stages import tokenize
from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.tokens import INFER, PLAIN, TokenizeConfig
from stages.data.tokens.originals import Rows, originals_of, published_tokenizer
from stages.data.tokens.views import Split, TokensArtifact
from tests.small_world import make_context, published, write_curated, write_ledger

SETTINGS = TokenizeConfig(vocab_size=300, sequence_length=64, max_prompt_length=32, bpe_train_bytes=10_000)


def tokens_of(home: Path, settings: TokenizeConfig, *, longer: bool = False) -> tuple[TokensArtifact, Rows]:
    """Tokens of a curated folder, in which some conversations may be too long; and the folder's rows."""
    curate = make_context(home, Stage.CURATE, CurateConfig())
    folder = write_curated(curate.output_dir)
    if longer:
        path = folder / "instructions" / "heldout.jsonl.gz"
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        for row in rows[::3]:
            row["messages"] += [
                {"role": "user", "content": "And then?" * 30},
                {"role": "assistant", "content": "Nothing."},
            ]
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        write_ledger(folder)
    context = make_context(home, Stage.TOKENIZE, settings, {"curated": published(curate)})
    tokenize.run(context)

    def read(part: str) -> Iterable[Mapping[str, Any]]:
        with gzip.open(folder / part / "heldout.jsonl.gz", "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    return TokensArtifact(context.output_dir), read


@pytest.mark.parametrize("template", ["auto", PLAIN, INFER])
def test_the_published_tokenizer_gives_the_ids_of_the_artifact(template: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"chat_template": template})
    tokens, rows = tokens_of(tmp_path, settings)
    found = originals_of(tokens, published_tokenizer(tokens, settings), settings, rows, split=Split.HELDOUT)
    assert len(found.conversations) == len(tokens.conversations(Split.HELDOUT)) == 15
    assert len(found.prompts) == len(tokens.prompts(Split.HELDOUT))
    assert len(found.pairs) == len(tokens.pairs(Split.HELDOUT))


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_rows_that_were_left_out_or_cut_are_so_again(policy: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"too_long": policy})
    tokens, rows = tokens_of(tmp_path, settings, longer=True)
    found = originals_of(tokens, published_tokenizer(tokens, settings), settings, rows, split=Split.HELDOUT)
    assert {len(chat.messages) for chat in found.conversations} == {2}
    assert len(found.conversations) == (10 if policy == "drop" else 15)


def test_rows_of_another_run_are_not_believed(tmp_path: Path) -> None:
    tokens, rows = tokens_of(tmp_path, SETTINGS)

    def changed(part: str) -> Iterable[Mapping[str, Any]]:
        for number, row in enumerate(rows(part)):
            if part == "instructions" and number == 3:
                row = {**row, "messages": [row["messages"][0], {"role": "assistant", "content": "Another answer."}]}
            yield row

    with pytest.raises(DataError, match="the curated rows give 15 rows of other ids than the 15 published"):
        originals_of(tokens, published_tokenizer(tokens, SETTINGS), SETTINGS, changed, split=Split.HELDOUT)
