"""A model that can be asked: weights, tokenizer, and all that says where an answer ends.

It may be a registered model, an artifact, a Hugging Face folder, a hub id or a GGUF file; what is read, and what is
refused, is what the pipeline reads and refuses. Reward models give scores and no text, and are refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.config.errors import ConfigError
from stages.config.graph import BASE_MODEL
from stages.config.places import is_gguf
from stages.data.tokens.chat import ChatEncoder
from stages.data.tokens.tokenizer import PLAIN_TEMPLATE, LoadedTokenizer
from stages.models.build import check_complete, load_for_text, positions_of
from stages.models.find import Found, find_model, is_artifact_address
from stages.models.folder import read_settings
from stages.models.given_tokenizer import check_growth, given_tokenizer
from stages.serve.address import Address

_UNLIMITED = 1 << 20
"""Tokenizers without a limit state an enormous one."""
_CONTEXT_WITHOUT_LIMIT = 8192
"""For models that name no number of positions: so many tokens fit into most memories."""
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class ServedModel:
    """A loaded model under the name that clients ask for."""

    name: str
    address: str
    model: Any
    device: torch.device
    tokenizer: LoadedTokenizer
    context_length: int
    """Most tokens that a prompt and its answer have together."""
    end_ids: frozenset[int]
    """Tokens that end an answer; they are no part of its text."""
    chat: ChatEncoder
    chat_stops: tuple[str, ...] = ()
    """Texts that end an answer in a chat, for models without control tokens between turns."""
    kind: str = ""
    """Of its artifact; empty for what is none of ours."""
    digest: str = ""
    """Of its artifact's content."""

    @property
    def has_own_template(self) -> bool:
        return not self.chat_stops


@dataclass(frozen=True)
class ModelFiles:
    """The verified files of a model on this machine."""

    folder: Path
    kind: str = ""
    digest: str = ""


def model_files(address: Address, cache_dir: Path) -> ModelFiles:
    """Find a model and bring its files here; raises ConfigError for what gives no text."""
    if is_artifact_address(address.uri):
        found = find_model(address.uri, also_given=True)
        _refuse_scores(found, address)
        return ModelFiles(found.fetch(cache_dir), found.manifest.kind, found.manifest.digest)
    try:
        folder = _given_folder(address.uri, cache_dir)
    except ConfigError as error:
        raise ConfigError(error.message.replace(f"{BASE_MODEL}=", "model="), advice=_ADVICE) from error
    return ModelFiles(folder)


_ADVICE = (
    "Give models:/<name>@<alias>, models:/<name>/<version>, the address of an artifact, a Hugging Face folder or hub "
    "id, or a GGUF file."
)


def _refuse_scores(found: Found, address: Address) -> None:
    if found.scores:
        raise ConfigError(
            f"{address.uri!r} is a {found.manifest.kind}, which gives scores and no text",
            advice="Give a model that writes: a base, SFT, PPO or DPO model.",
        )


def _given_folder(uri: str, cache_dir: Path) -> Path:
    from stages.models.given import base_model_dir, gguf_file, snapshot_base_model

    if not is_gguf(uri):
        return base_model_dir(uri, cache_dir)
    from stages.models.gguf import convert_gguf

    folder = cache_dir / "converted" / snapshot_base_model(uri).removeprefix("sha256:")
    if not (folder / "config.json").is_file():
        work = folder.with_name(f"{folder.name}.part")
        work.mkdir(parents=True, exist_ok=True)
        convert_gguf(gguf_file(uri, cache_dir), work)
        work.rename(folder)
    return folder


def load_model(
    address: Address, files: ModelFiles, *, device: torch.device, dtype: torch.dtype, context_length: int = 0
) -> ServedModel:
    """Load weights in `dtype`; raises ConfigError for a context that the model does not have, and for files that make
    no model. `context_length` 0 is all that the model has."""
    tokenizer = given_tokenizer(files.folder)
    model: Any
    model, loading = load_for_text(files.folder, dtype=dtype)
    check_complete(loading, files.folder)
    rows = model.get_input_embeddings().weight.shape[0]
    if missing := check_growth(tokenizer.backend, rows=rows):
        raise ConfigError(
            f"the tokenizer of {address.uri!r} has {missing} tokens that the model has no embedding for",
            advice="Train it first (SFT on instructions adds them), or give the tokenizer that belongs to the model.",
        )
    plain = PLAIN_TEMPLATE in tokenizer.chat_template and not tokenizer.template_origin
    return ServedModel(
        name=address.name,
        address=address.uri,
        model=model.eval().to(device),
        device=device,
        tokenizer=tokenizer,
        context_length=_context(model, tokenizer, context_length, address),
        end_ids=_end_ids(files.folder, tokenizer),
        chat=tokenizer.chat(),
        # A base model has never seen an end after "Assistant: ...", and would write the next question too.
        chat_stops=("\nUser:", "\nSystem:") if plain else (),
        kind=files.kind,
        digest=files.digest,
    )


def _context(model: Any, tokenizer: LoadedTokenizer, wanted: int, address: Address) -> int:
    known = [positions_of(model), tokenizer.max_length if 0 < tokenizer.max_length < _UNLIMITED else None]
    longest = min((limit for limit in known if limit), default=_CONTEXT_WITHOUT_LIMIT)
    if wanted > longest:
        raise ConfigError(
            f"--context={wanted}, but {address.uri!r} reads and writes at most {longest} tokens",
            advice=f"Give --context {longest} or less, or leave it out.",
        )
    return wanted or longest


def _end_ids(folder: Path, tokenizer: LoadedTokenizer) -> frozenset[int]:
    """The end of a text, the end of a turn, and what the model's publisher says ends its answers."""
    ends = {tokenizer.eos_id}
    if turn_end := tokenizer.backend.token_to_id(tokenizer.chat().usual_end):
        ends.add(turn_end)
    if (folder / _GENERATION).is_file():
        stated = read_settings(folder / _GENERATION).get("eos_token_id")
        ends |= {number for number in (stated if isinstance(stated, list) else [stated]) if isinstance(number, int)}
    return frozenset(ends)
