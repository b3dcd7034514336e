"""An exported folder as a repository of the hub: one commit, made with the token of the environment.

HF_ENDPOINT names another server than huggingface.co. The token is read by huggingface_hub (HF_TOKEN, or what
`hf auth login` has stored), and never from the command line, where other users of the machine could read it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config.errors import ConfigError, StageError
from stages.config.text import one_line

_OURS_TO_ADD_TO = frozenset({".gitattributes", "README.md", "LICENSE", ".gitignore"})
"""What a repository may hold that was just made on the hub's page."""


@dataclass(frozen=True)
class Repository:
    """Where an export goes, once it is known that it may."""

    id: str
    exists: bool

    @property
    def server(self) -> str:
        return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def check_repository(name: str, *, overwrite: bool) -> Repository:
    """Ask the hub who we are and what is there; raises ConfigError when the export could not be pushed there."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not get_token():
        raise ConfigError(
            f"--push={name!r} needs a token of the hub, and the environment has none",
            advice="Set HF_TOKEN to a token that may write to the repository "
            "(https://huggingface.co/settings/tokens), or run `hf auth login`.",
        )
    with _refusals(name):
        api = _api()
        api.whoami()
        try:
            files = set(api.list_repo_files(name))
        except RepositoryNotFoundError:
            return Repository(name, exists=False)
    if (others := sorted(files - _OURS_TO_ADD_TO)) and not overwrite:
        raise ConfigError(
            f"the repository {name} is not empty: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}",
            advice="Name another one, or let one commit replace its files with --overwrite; its history stays.",
        )
    return Repository(name, exists=True)


def push(folder: Path, repository: Repository, *, public: bool, message: str) -> str:
    """Upload the folder in one commit that removes every other file, and return the page of the repository.

    A new repository is private unless `public`; an existing one stays as it is.
    """
    with _refusals(repository.id):
        api = _api()
        if not repository.exists:
            api.create_repo(repository.id, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository.id, folder_path=folder, commit_message=message, delete_patterns=["*"])
    return f"{repository.server}/{repository.id}"


def _api() -> Any:
    from huggingface_hub import HfApi

    # by itself it would take the address that was set when it was first imported
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="athanor")


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Give the hub's errors a category: what it refuses is `config`, when it is away a later try may succeed."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import httpx

    try:
        yield
    except HFValidationError as error:
        raise ConfigError(
            f"--push={name!r}: {one_line(str(error), at_most=300)}", advice="Correct the name."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = one_line(str(error), at_most=300)
        if status in (401, 403, 404):
            raise ConfigError(
                f"the hub refuses to let this token write to {name}: {said}",
                advice="Check that HF_TOKEN is valid, has the permission to write, and that its account belongs to the "
                "organisation of the repository.",
            ) from error
        if 400 <= status < 500 and status != 429:
            raise ConfigError(
                f"the hub refuses the upload to {name}: {said}", advice="Correct what it names."
            ) from error
        raise StageError(f"the hub failed: {said}", advice="Export again later.") from error
    except (httpx.HTTPError, OSError) as error:
        raise StageError(
            f"the hub does not answer: {type(error).__name__}: {one_line(str(error), at_most=300)}",
            advice="Check the network and HF_ENDPOINT; the exported folder, if one was asked for, is complete.",
        ) from error
