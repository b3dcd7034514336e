"""The previous champion becomes champion again: what moves, what is recorded, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from operators.rollback import roll_back
from stages.artifacts.addresses import open_store
from stages.config.errors import ConfigError, StageError
from stages.config.forms import RollbackParams
from stages.config.graph import Stage
from stages.config.validation import validated
from tests.pipeline_records import publish_run
from tests.registry import RegisteredModels, serving

NAME = "demo-aligned"
WHY = RollbackParams(run_name="demo", reason="answers in the wrong language")


class House:
    """Two registered models, of which the second has taken the title from the first."""

    def __init__(self, root: Path) -> None:
        self.models = RegisteredModels()
        for version, salt in (("1", "old"), ("2", "new")):
            _, made = publish_run(root, salt=salt)
            ref = made[Stage.DPO]
            self.models.versions[NAME, version] = {
                "artifact.uri": ref.uri,
                "lineage.fingerprint": ref.fingerprint,
                "lineage.digest": ref.digest,
            }
        self.models.aliases |= {(NAME, "champion"): "2", (NAME, "previous"): "1", (NAME, "candidate"): "2"}
        self.root = root

    def aliases(self) -> dict[str, str]:
        return {alias: version for (_, alias), version in self.models.aliases.items()}

    def records(self) -> list[dict[str, str]]:
        store = open_store((self.root / "store").as_uri())
        return [json.loads(store.read_bytes(key)) for key in sorted(store.list("rollbacks"))]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    house = House(tmp_path)
    monkeypatch.setenv("ARTIFACT_STORE", (tmp_path / "store").as_uri())
    with serving(house.models) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield house


def test_the_previous_champion_is_champion_again_and_both_say_so(house: House) -> None:
    record = roll_back(WHY, by="ada")
    assert house.aliases() == {"champion": "1", "candidate": "2"}
    assert (record["from_version"], record["to_version"], record["by"]) == ("2", "1", "ada")
    assert house.records() == [record]
    tags = house.models.versions[NAME, "2"]
    assert (tags["rollback.reason"], tags["rollback.by"], tags["rollback.to"]) == (WHY.reason, "ada", "1")
    assert tags["rollback.at"] == record["at"]
    assert house.models.versions[NAME, "1"]["rollback.from"] == "2"


def test_there_is_one_step_back_and_no_second(house: House) -> None:
    roll_back(WHY, by="ada")
    with pytest.raises(ConfigError, match="has no previous champion that version 1 could give way to") as caught:
        roll_back(WHY, by="ada")
    assert "run_name='demo'" in caught.value.message
    assert "set its alias 'champion' in MLflow" in caught.value.advice
    assert house.aliases()["champion"] == "1"
    assert len(house.records()) == 1


def test_a_run_name_without_a_champion_is_refused(house: House) -> None:
    with pytest.raises(ConfigError, match="nobody-aligned has no champion"):
        roll_back(RollbackParams(run_name="nobody", reason="x"), by="ada")
    assert house.records() == []


def test_a_previous_champion_that_cannot_be_read_does_not_become_champion(house: House) -> None:
    house.models.versions[NAME, "1"]["lineage.digest"] = "e" * 64
    with pytest.raises(ConfigError, match="has other content than was registered"):
        roll_back(WHY, by="ada")
    house.models.versions[NAME, "1"]["artifact.uri"] += "0"
    with pytest.raises(ConfigError, match="cannot be read"):
        roll_back(WHY, by="ada")
    assert house.aliases()["champion"] == "2"
    assert house.records() == []


@pytest.mark.parametrize(
    "broken_off_at",
    ["POST model-versions/set-tag", "POST registered-models/alias", "DELETE registered-models/alias"],
)
def test_a_rollback_that_broke_off_is_completed_by_its_repetition(house: House, broken_off_at: str) -> None:
    house.models.refuse.append(broken_off_at)
    with pytest.raises(StageError, match="HTTP 503") as caught:
        roll_back(WHY, by="ada")
    assert not isinstance(caught.value, ConfigError), "it is retried"
    assert house.aliases()["champion"] in ("1", "2"), "there is always a champion"
    done = roll_back(WHY, by="ada")
    assert (done["from_version"], done["to_version"]) == ("2", "1")
    assert house.aliases() == {"champion": "1", "candidate": "2"}
    assert house.models.versions[NAME, "2"]["rollback.reason"] == WHY.reason


@pytest.mark.parametrize("values", [{"run_name": "demo"}, {"run_name": "demo", "reason": "  "}])
def test_a_rollback_needs_a_reason(values: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="reason: it is empty; say why"):
        validated(RollbackParams, values)
