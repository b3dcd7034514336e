"""The tokenizer of a given model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from stages.config.errors import ConfigError
from stages.config.tokens import INFER, OWN
from stages.data.tokens.tokenizer import PLAIN_TEMPLATE, LoadedTokenizer, marked_template
from stages.models.foreign_code import may_run_code


def given_tokenizer(folder: Path, *, chat_template: str = OWN) -> LoadedTokenizer:
    """Load a base model's tokenizer; raises ConfigError when it is not a fast tokenizer or does not fit the model.

    Where plain encoding starts with a begin token and the chat template writes none, the template gets it in front.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # a tokenizer's code never runs
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base_model: no tokenizer in {folder}: {error}",
            advice="Save the model's tokenizer files next to its weights.",
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(
            f"base_model: the tokenizer in {folder} is not a fast tokenizer", advice="Provide its tokenizer.json."
        )
    if not loaded.eos_token:
        raise ConfigError(f"base_model: the tokenizer in {folder} has no end token", advice="Set its eos_token.")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=may_run_code(folder))
    check_growth(loaded.backend_tokenizer, rows=config.vocab_size)
    special = {
        "bos_token": loaded.bos_token or "",
        "eos_token": loaded.eos_token,
        "pad_token": loaded.pad_token or loaded.eos_token,
    }
    template = marked_template(chat_template, _own_template(loaded) or PLAIN_TEMPLATE)
    made = LoadedTokenizer(
        loaded.backend_tokenizer,
        template,
        special,
        max_length=int(loaded.model_max_length),
        infer_spans=chat_template == INFER,
    )
    if _adds_bos(made) and not made.chat().begins_with(special["bos_token"]):
        made = replace(made, chat_template="{{ bos_token }}" + template)
    return made


def _own_template(loaded: Any) -> str:
    """A tokenizer's chat template; of several named ones the one called `default`."""
    template = loaded.chat_template or ""
    if isinstance(template, dict):
        if "default" not in template:
            raise ConfigError(
                f"base_model: the tokenizer has the chat templates {sorted(template)} and none called 'default'",
                advice="Give the text of the one to use as tokenize.chat_template.",
            )
        template = template["default"]
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
    return max(without, default=rows - 1) + 1 - rows
