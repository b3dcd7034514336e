"""Whether a given reward model, or what one is trained from, reads the ids that the policy writes.

Policy and reward model share their token ids: one writes them, the other reads them. So both vocabularies, special
tokens included, must agree id by id. What merges or normalisers do does not matter: the policy's encode all text.
"""

from pathlib import Path

from tokenizers import Tokenizer

from stages.config.errors import ConfigError
from stages.config.graph import BASE_MODEL
from stages.config.tokens import PLAIN
from stages.models.folder import check_folder, read_settings
from stages.models.given_tokenizer import given_tokenizer

_SHOWN = 3
_HEAD = "ForSequenceClassification"


def check_given_scorer(folder: Path, policy: Tokenizer, *, role: str) -> None:
    """Raise ConfigError unless the folder holds a sequence classifier with one output that reads the policy's ids."""
    check_one_score(folder, role=role)
    check_same_tokenizer(folder, policy, role=role)


def check_one_score(folder: Path, *, role: str) -> None:
    """Raise ConfigError unless the folder holds a sequence classifier with one output."""
    check_folder(folder)
    settings = read_settings(folder / "config.json")
    names = settings.get("architectures")
    if not isinstance(names, list) or not any(isinstance(name, str) and name.endswith(_HEAD) for name in names):
        raise ConfigError(
            f"{role}={str(folder)!r} holds {names}, which gives no scores; allowed: a model ...{_HEAD} with one output",
            advice="Give a reward model; a language model becomes one as reward_base, by training on preferences.",
        )
    # transformers writes the number of labels as their names, and leaves out its default of two.
    labels = settings.get("id2label")
    outputs = len(labels) if isinstance(labels, dict) else 2
    if outputs != 1:
        raise ConfigError(
            f"{role}={str(folder)!r} has {outputs} outputs (id2label in config.json); allowed: 1, the score",
            advice="Give a reward model with num_labels=1.",
        )


def check_same_tokenizer(folder: Path, policy: Tokenizer, *, role: str, policy_name: str = "the policy") -> None:
    """Raise ConfigError that names both unless the model in the folder has the policy's token ids."""
    try:
        theirs = given_tokenizer(folder, chat_template=PLAIN).backend
    except ConfigError as error:
        raise ConfigError(error.message.replace(BASE_MODEL, role), advice=error.advice) from error
    ours, found = policy.get_vocab(with_added_tokens=True), theirs.get_vocab(with_added_tokens=True)
    if ours == found:
        return
    differing = sorted(
        (token for token in ours.keys() | found.keys() if ours.get(token) != found.get(token)),
        key=lambda token: (ours.get(token, 1 << 62), token),
    )
    shown = "; ".join(
        f"{token!r} is {ours.get(token, 'absent')} in the policy's and {found.get(token, 'absent')} in the other"
        for token in differing[:_SHOWN]
    )
    raise ConfigError(
        f"{role}: the tokenizer in {folder} ({len(found)} tokens) is not that of {policy_name} ({len(ours)} tokens): "
        f"{len(differing)} tokens differ: {shown}",
        advice=f"Give a {role} of the policy's own model family, or leave it empty to train one from the policy.",
    )
