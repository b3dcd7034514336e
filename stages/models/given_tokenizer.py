"""The tokenizer of a given model: its files as they lie in the folder, without what they say about other files."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from stages.config.errors import ConfigError
from stages.config.tokens import AUTO
from stages.data.tokens.tokenizer import PLAIN_TEMPLATE, LoadedTokenizer, marked_template, with_spans
from stages.models.folder import check_folder, is_malformed, read_settings, told
from stages.models.foreign_code import may_run_code

_SETTINGS = "tokenizer_config.json"
_OBJECTS = frozenset(
    {"config.json", _SETTINGS, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
)
"""What loading a tokenizer may read; other JSON files of a folder are not to blame."""
_LARGEST_ID = 1 << 24
"""No vocabulary is near it; tables that are as long as the largest id must fit into memory."""


def given_tokenizer(folder: Path, *, chat_template: str = AUTO) -> LoadedTokenizer:
    """Load a base model's tokenizer; raises ConfigError when it is not a fast tokenizer or does not fit the model.

    Where plain encoding starts with a begin token and the chat template writes none, the template gets it in front.
    """
    loaded = _loaded(folder)
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(
            f"base_model: the tokenizer in {folder} is not a fast tokenizer", advice="Provide its tokenizer.json."
        )
    if not loaded.eos_token:
        raise ConfigError(f"base_model: the tokenizer in {folder} has no end token", advice="Set its eos_token.")
    backend: Tokenizer = loaded.backend_tokenizer
    # Some tokenizer.json were saved with the limits of one batch; documents and conversations are cut elsewhere.
    backend.no_truncation()
    backend.no_padding()
    check_growth(backend, rows=_rows(folder))
    special = {
        "bos_token": loaded.bos_token or "",
        "eos_token": loaded.eos_token,
        "pad_token": loaded.pad_token or loaded.eos_token,
    }
    own = _own_template(loaded, folder)
    template = marked_template(chat_template, own or PLAIN_TEMPLATE)
    made = LoadedTokenizer(
        backend,
        template,
        special,
        max_length=_max_length(loaded, folder),
        template_origin=str(folder) if template == own else "",
    )
    if _adds_bos(made) and not made.chat().begins_with(special["bos_token"]):
        made = replace(made, chat_template="{{ bos_token }}" + template)
    return with_spans(made, chat_template)


def _loaded(folder: Path) -> Any:
    """The tokenizer by transformers, from a copy of the covered files alone."""
    from transformers import AutoTokenizer

    files = check_folder(folder)
    with tempfile.TemporaryDirectory(prefix="athanor-tokenizer-") as scratch:
        for path in files:
            if path.suffix != ".safetensors":
                (Path(scratch) / path.name).symlink_to(path.resolve())
        _stage_settings(folder / _SETTINGS, Path(scratch) / _SETTINGS)
        try:
            # A tokenizer's code never runs.
            return AutoTokenizer.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
        except BaseException as error:
            if not is_malformed(error):
                raise
            for path in files:
                if path.name in _OBJECTS:
                    read_settings(path)  # names the file where it is no JSON object
            raise ConfigError(
                f"base_model: no tokenizer in {folder}: {told(error).replace(scratch, str(folder))}",
                advice="Save the model's tokenizer files next to its weights.",
            ) from error


def _stage_settings(source: Path, target: Path) -> None:
    """Copy tokenizer_config.json without its names of files, which are paths of the machine that it was saved on."""
    if not source.is_file():
        return
    kept = {key: value for key, value in read_settings(source).items() if not key.endswith(("_file", "_files"))}
    target.unlink()
    target.write_text(json.dumps(kept))


def _rows(folder: Path) -> int:
    """How many tokens the model embeds, by its config.json."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=may_run_code(folder)
        ).vocab_size
    except BaseException as error:
        if not is_malformed(error):
            raise
        raise ConfigError(
            f"base_model: {folder / 'config.json'} is no configuration of a language model: {told(error)}",
            advice="Save the model again with save_pretrained.",
        ) from error
    if not isinstance(found, int) or found < 1:
        raise ConfigError(
            f"base_model: {folder / 'config.json'} has vocab_size={found!r}, which is no number of tokens",
            advice="Save the model again with save_pretrained.",
        )
    return found


def _max_length(loaded: Any, folder: Path) -> int:
    try:
        return int(loaded.model_max_length)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"base_model: {folder / _SETTINGS} has model_max_length={loaded.model_max_length!r}",
            advice="Set it to a number of tokens, or remove it.",
        ) from error


def _own_template(loaded: Any, folder: Path) -> str:
    """A tokenizer's chat template; of several named ones the one called `default`."""
    template = loaded.chat_template or ""
    if isinstance(template, dict):
        if "default" not in template:
            raise ConfigError(
                f"base_model: the tokenizer has the chat templates {sorted(map(str, template))} and none called "
                "'default'",
                advice="Give the text of the one to use as tokenize.chat_template.",
            )
        template = template["default"]
    if not isinstance(template, str):
        raise ConfigError(
            f"base_model: {folder / _SETTINGS} has chat_template={template!r}, which is no text",
            advice="Give the text of the template, there or as tokenize.chat_template.",
        )
    return template


def _adds_bos(tokenizer: LoadedTokenizer) -> bool:
    """Whether plain encoding begins with the begin token."""
    tokenizer.backend.encode_special_tokens = False
    ids = tokenizer.backend.encode("a", add_special_tokens=True).ids
    return tokenizer.bos_id >= 0 and ids[:1] == [tokenizer.bos_id]


def check_growth(backend: Tokenizer, *, rows: int) -> int:
    """Return how many rows an embedding of `rows` lacks for this tokenizer.

    Raises ConfigError unless all missing rows are of tokens that were added to a vocabulary: when the vocabulary's own
    pieces have no row, the tokenizer belongs to another model.
    """
    without = {index for index in backend.get_vocab(with_added_tokens=True).values() if index >= rows}
    if without - set(backend.get_added_tokens_decoder()):
        raise ConfigError(
            f"base_model: the tokenizer has {backend.get_vocab_size()} entries, the model embeds {rows}; not a pair",
            advice="Use the tokenizer that the model was trained with; only tokens added to it may be new.",
        )
    missing = max(without, default=rows - 1) + 1 - rows
    if rows + missing > _LARGEST_ID:
        raise ConfigError(
            f"base_model: the tokenizer and the model have ids up to {rows + missing - 1}; at most {_LARGEST_ID - 1}",
            advice="Check vocab_size in config.json and the ids in tokenizer.json.",
        )
    return missing
