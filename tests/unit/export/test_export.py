"""Exports of real small models: what transformers and peft make of them, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from stages.config.errors import ConfigError, DamagedArtifactError
from stages.config.graph import Stage
from stages.config.request import InputEntry, SourceEntry, SourceKind
from stages.export.__main__ import main
from stages.export.request import Dtype, ExportRequest
from stages.export.write import export
from tests.pipeline_records import publish_artifact, tampered
from tests.unit.export.conftest import House, logits


def asked(house: House, stage: Stage, to: Path, **options: Any) -> ExportRequest:
    return ExportRequest(address=house.made[stage].uri, to=to, **options)


def card_of(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("stage", [Stage.SFT, Stage.DPO], ids=str)
def test_the_exported_folder_answers_in_plain_transformers_as_the_artifact_does(
    stage: Stage, house: House, tmp_path: Path
):
    made = export(asked(house, stage, tmp_path / "out"))
    expected = logits(AutoModelForCausalLM.from_pretrained(house.folder(stage)))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    messages = [{"role": "user", "content": "What does `sort_array` do?"}]
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (house.folder(stage), tmp_path / "out"))
    assert theirs.apply_chat_template(messages)["input_ids"] == ours.apply_chat_template(messages)["input_ids"]
    assert "history.jsonl" not in made.files
    assert not [name for name in made.files if name.startswith("adapter")]


def test_the_adapter_on_its_base_gives_the_logits_of_the_merged_model(house: House, tmp_path: Path):
    from peft import PeftConfig, PeftModel

    export(asked(house, Stage.DPO, tmp_path / "out", adapter=True))
    config: Any = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert config.base_model_name_or_path == str(house.folder(Stage.SFT))
    start = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
    before = logits(start)
    found = logits(PeftModel.from_pretrained(start, tmp_path / "out"))
    merged = logits(AutoModelForCausalLM.from_pretrained(house.folder(Stage.DPO)))
    torch.testing.assert_close(found, merged, rtol=0, atol=1e-5)
    assert (found - before).abs().max() > 1e-3
    assert not (tmp_path / "out" / "model.safetensors").exists()
    # transformers alone follows the name of the base, too
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), merged, rtol=0, atol=1e-5
    )


def test_a_reward_models_adapter_and_folder_score_alike(house: House, tmp_path: Path):
    from peft import PeftModel

    export(asked(house, Stage.REWARD, tmp_path / "whole"))
    export(asked(house, Stage.REWARD, tmp_path / "adapter", adapter=True))
    base = AutoModelForSequenceClassification.from_pretrained(house.folder(Stage.SFT), num_labels=1, pad_token_id=0)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    found = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(whole), rtol=0, atol=1e-5)
    assert card_of(tmp_path / "whole").data.pipeline_tag == "text-classification"


@pytest.mark.parametrize(("dtype", "torch_dtype"), [(Dtype.BF16, torch.bfloat16), (Dtype.FP16, torch.float16)])
def test_weights_are_cast_and_config_and_card_say_so(
    dtype: Dtype, torch_dtype: torch.dtype, house: House, tmp_path: Path
):
    export(asked(house, Stage.SFT, tmp_path / "out", dtype=dtype))
    stored = load_file(house.folder(Stage.SFT) / "model.safetensors")
    cast = load_file(tmp_path / "out" / "model.safetensors")
    assert cast.keys() == stored.keys()
    assert all(torch.equal(cast[name], stored[name].to(torch_dtype)) for name in stored)
    modes = {path.name: oct(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    name = str(torch_dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch_dtype
    assert f"parameters in {name}" in (tmp_path / "out" / "README.md").read_text()


def changed_copy(house: House, tmp_path: Path, stage: Stage, *, salt: str, **weights: torch.Tensor) -> str:
    """Another artifact of the stage, some of whose weights are others."""
    folder = tmp_path / f"changed-{salt}"
    shutil.copytree(house.folder(stage), folder, ignore=shutil.ignore_patterns("manifest.json"))
    save_file(load_file(folder / "model.safetensors") | weights, folder / "model.safetensors", {"format": "pt"})
    ref, _ = publish_artifact(house.store, stage, {"model": house.made[Stage.PRETRAIN]}, folder, salt=salt)
    return ref.uri


def test_numbers_that_fp16_cannot_hold_are_refused_and_nothing_is_left(house: House, tmp_path: Path):
    weight = load_file(house.folder(Stage.SFT) / "model.safetensors")["model.norm.weight"].clone()
    weight[0] = 1e5
    address = changed_copy(house, tmp_path, Stage.SFT, salt="large", **{"model.norm.weight": weight})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has values up to 1e\+05, which float16 cannot hold"):
        export(ExportRequest(address=address, to=tmp_path / "new" / "out", dtype=Dtype.FP16))
    assert list((tmp_path / "new").iterdir()) == []
    export(ExportRequest(address=address, to=tmp_path / "new" / "out", dtype=Dtype.BF16))


def test_a_model_in_shards_keeps_them_and_its_index_tells_their_size(house: House, tmp_path: Path):
    folder = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(house.folder(Stage.SFT)).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ref, _ = publish_artifact(house.store, Stage.SFT, {}, folder, salt="shards")
    export(ExportRequest(address=ref.uri, to=tmp_path / "out", dtype=Dtype.BF16))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sizes += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == sizes
    expected = AutoModelForCausalLM.from_pretrained(house.folder(Stage.SFT), dtype=torch.bfloat16)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")), logits(expected))


def test_the_card_tells_lineage_numbers_and_limits_and_no_address_of_the_house(house: House, tmp_path: Path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "metrics.json").write_text("{}")
    measured = {"dpo/eval/win_rate": 0.625, "sft/eval/perplexity": 9.5}
    sft, dpo = house.made[Stage.SFT], house.made[Stage.DPO]
    publish_artifact(house.store, Stage.EVALUATE, {"sft": sft, "dpo": dpo}, folder, metrics=measured)
    export(asked(house, Stage.DPO, tmp_path / "my-model", licence="apache-2.0"))
    card = card_of(tmp_path / "my-model")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "datasets": ["org/chats"],
        "tags": ["athanor", "pretrain", "sft", "dpo", "lora"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    for said in (
        "# my\\-model",
        house.made[Stage.DPO].digest[:12],
        house.made[Stage.CURATE].fingerprint[:12],
        "eval/dpo\\_accuracy | 0.75",
        "eval/win\\_rate | 0.625",
        "books",
        "hf\\://org/chats",
        "trained on 5 M tokens cannot write sentences that are right",
        "c0ffee",
        '"rank": 2',
        "against the SFT model that it started from",
        "## What it is for",
        "No gate has left a record of it.",
    ):
        assert said in card.content, said
    assert "secret-project" not in card.content
    assert str(house.home) not in card.content
    assert "perplexity" not in card.content  # another model's


def test_without_a_licence_the_card_says_unknown_and_what_to_do(house: House, tmp_path: Path):
    export(asked(house, Stage.SFT, tmp_path / "out"))
    card = card_of(tmp_path / "out")
    assert card.data.license == "unknown"
    assert "Nobody has stated a licence" in card.content


def given_base(house: House, tmp_path: Path, uri: str, digest: str) -> str:
    """A DPO model whose base came from outside the store."""
    folder = tmp_path / "given"
    shutil.copytree(house.folder(Stage.DPO), folder, ignore=shutil.ignore_patterns("manifest.json"))
    source = SourceEntry(role="base_model", kind=SourceKind.MODEL, uri=uri, digest=digest)
    config = {"lora": {"rank": 2}}
    salt = str(abs(hash(uri)))
    ref, _ = publish_artifact(house.store, Stage.DPO, {}, folder, salt=salt, sources=(source,), config=config)
    return ref.uri


def test_an_adapter_of_a_hub_model_names_it_and_its_revision(house: House, tmp_path: Path):
    address = given_base(house, tmp_path, "some-org/some-base", "a" * 40)
    export(ExportRequest(address=address, to=tmp_path / "out", adapter=True))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some-org/some-base"
    assert settings["revision"] == "a" * 40
    card = card_of(tmp_path / "out")
    assert card.data.base_model == ["some-org/some-base"]
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "peft"
    assert "`some-org/some-base` at revision" in card.content
    export(ExportRequest(address=address, to=tmp_path / "merged"))
    assert card_of(tmp_path / "merged").data.base_model_relation == "finetune"


def test_another_base_than_the_one_of_training_is_refused(house: House, tmp_path: Path):
    with pytest.raises(ConfigError, match="is not the model that the adapter was trained on"):
        export(asked(house, Stage.DPO, tmp_path / "out", adapter=True, base=str(house.folder(Stage.PRETRAIN))))
    assert not (tmp_path / "out").exists()
    export(asked(house, Stage.SFT, tmp_path / "base", dtype=Dtype.BF16))
    export(asked(house, Stage.DPO, tmp_path / "out", adapter=True, base=str(tmp_path / "base")))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")


def test_an_adapter_whose_training_added_tokens_is_refused(house: House, tmp_path: Path):
    smaller = tmp_path / "smaller"
    model = AutoModelForCausalLM.from_pretrained(house.folder(Stage.SFT))
    model.resize_token_embeddings(model.config.vocab_size - 3)
    model.save_pretrained(smaller)
    address = given_base(house, tmp_path, str(smaller), "d" * 64)
    with pytest.raises(ConfigError, match="training added tokens") as refused:
        export(ExportRequest(address=address, to=tmp_path / "out", adapter=True))
    assert "leave out --adapter" in refused.value.advice


def test_an_adapter_is_not_pushed_with_a_base_that_nobody_finds(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stages.export.write.check_repository", lambda name, overwrite: None)
    with pytest.raises(ConfigError, match="which nobody finds who reads me/model"):
        export(asked(house, Stage.DPO, tmp_path / "out", adapter=True, push="me/model"))


def test_full_training_has_no_adapter(house: House, tmp_path: Path):
    with pytest.raises(ConfigError, match="its sft trained all parameters"):
        export(asked(house, Stage.SFT, tmp_path / "out", adapter=True))


def test_damage_is_named_and_leaves_no_folder(house: House, tmp_path: Path):
    address = changed_copy(house, tmp_path, Stage.SFT, salt="damaged")
    weights = Path(address.removeprefix("file://")) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamagedArtifactError, match=r"model\.safetensors does not have the content"):
        export(ExportRequest(address=address, to=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_only_earlier_exports_are_overwritten_and_only_when_asked(house: House, tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    export(asked(house, Stage.SFT, target))  # an empty folder is nobody's
    with pytest.raises(ConfigError, match="is not empty"):
        export(asked(house, Stage.DPO, target))
    (target / "left.txt").touch()
    export(asked(house, Stage.DPO, target, overwrite=True))
    assert json.loads((target / "athanor.json").read_text())["stage"] == "dpo"
    assert not (target / "left.txt").exists()
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "to-mum.txt").touch()
    with pytest.raises(ConfigError, match="holds something else than an export"):
        export(asked(house, Stage.DPO, letters, overwrite=True))
    assert os.listdir(letters) == ["to-mum.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        export(asked(house, Stage.DPO, letters / "to-mum.txt", overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "out"]


def test_a_failed_overwrite_keeps_what_was_there(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "out"
    export(asked(house, Stage.SFT, target))

    def full(facts: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stages.export.write.model_card", full)
    with pytest.raises(OSError, match="No space"):
        export(asked(house, Stage.DPO, target, overwrite=True))
    assert json.loads((target / "athanor.json").read_text())["stage"] == "sft"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_room_is_told_before_anything_is_read(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stages.export.target.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ConfigError, match=r"the export needs .* KiB, and the disk of .* has 1000 B left"):
        export(asked(house, Stage.SFT, tmp_path / "out"))


UNKNOWN = [
    ("some-org/some-model", "is no artifact of Athanor's"),
    (".", "is a folder, but no artifact of Athanor's"),
    ("models:/name", "names no version of a model"),
    ("file:///nowhere", "is not the address of an artifact"),
    ("file:///nowhere/artifacts/sft-model/abc", "there is no artifact at"),
    ("s3://bucket/model", "is not the address of an artifact"),
]


@pytest.mark.parametrize(("address", "said"), UNKNOWN)
def test_an_unknown_address_is_refused_with_what_to_give(address: str, said: str, tmp_path: Path, capsys):
    assert main([address, "--to", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "models:/<name>@<alias>" in told


def test_an_artifact_that_is_no_model_is_refused(house: House, tmp_path: Path):
    with pytest.raises(ConfigError, match="is of kind 'tokens', which is no model; allowed: base-model, sft-model"):
        export(asked(house, Stage.TOKENIZE, tmp_path / "out"))


def test_the_command_line_takes_a_folder_of_the_store_and_tells_what_it_wrote(house: House, tmp_path: Path, capsys):
    assert main([str(house.folder(Stage.SFT)), "--to", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: README.md, athanor.json" in said
    record = json.loads((tmp_path / "out" / "athanor.json").read_text())
    assert record["dtype"] == "bfloat16"
    assert record["digest"] == house.made[Stage.SFT].digest
    assert "model.safetensors" in record["files"]


def test_a_registered_model_is_exported_only_as_it_was_registered(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from stages.tracking.client import RegisteredArtifact

    digest = house.made[Stage.SFT].digest
    known = {"models:/a-sft@champion": digest, "models:/a-sft/1": "e" * 64}
    monkeypatch.setattr(
        "stages.tracking.client.registered_artifact",
        lambda address: RegisteredArtifact(house.made[Stage.SFT].uri, known[address]),
    )
    export(ExportRequest(address="models:/a-sft@champion", to=tmp_path / "out"))
    assert "# a\\-sft" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="was registered with content eeeeeeeeeeee"):
        export(ExportRequest(address="models:/a-sft/1", to=tmp_path / "other"))


def test_a_model_whose_past_was_removed_is_exported_and_the_card_says_so(house: House, tmp_path: Path):
    folder = tmp_path / "orphan"
    shutil.copytree(house.folder(Stage.SFT), folder, ignore=shutil.ignore_patterns("manifest.json"))
    ref, manifest = publish_artifact(house.store, Stage.SFT, {}, folder, salt="orphan")
    gone = house.made[Stage.PRETRAIN].uri[:-4] + "dead"
    entry = InputEntry(role="model", kind="base-model", uri=gone, fingerprint="dead", digest="d" * 64)
    tampered(ref, inputs=[entry.model_dump()])
    export(ExportRequest(address=ref.uri, to=tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "is not in the store any more" in text
    assert manifest.fingerprint[:12] in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exported nowhere"),
        ({"push": "model"}, "no repository of a hub"),
        ({"push": "a/b/c"}, "no repository of a hub"),
        (
            {"to": Path("x"), "gguf": "q4_k_m"},
            "no type that llama.cpp's converter writes; allowed: f32, f16, bf16, q8_0",
        ),
        ({"to": Path("x"), "gguf": "f16", "adapter": True}, "asks for the adapter alone"),
        ({"to": Path("x"), "base": "a/b"}, "a whole model needs none"),
        ({"to": Path("x"), "public": True}, "about a repository"),
        ({"to": Path("x"), "licence": "My Licence\nx: y"}, "is no licence id"),
        ({"to": Path("a\nb")}, "control characters"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        ExportRequest(address="models:/a@b", **options)
