"""What is served: names, files, where answers end, and what is refused."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from stages.config.errors import ConfigError, StageError
from stages.config.graph import Stage
from stages.config.places import local_path
from stages.serve.address import Address, parse_addresses
from stages.serve.loading import ServedModel, load_model, model_files
from stages.serve.vllm import Listening, choose_vllm, vllm_command, vllm_environment, vllm_program
from tests.unit.serve.conftest import House, Load


def loaded(folder: Path, *, context: int = 0) -> ServedModel:
    address = Address("model", str(folder))
    files = model_files(address, folder.parent / "cache")
    return load_model(address, files, device=torch.device("cpu"), dtype=torch.float32, context_length=context)


@pytest.fixture
def folder(house: House, tmp_path: Path) -> Path:
    """The files of the SFT model as a plain Hugging Face folder."""
    target = tmp_path / "plain"
    shutil.copytree(local_path(house.uri(Stage.SFT)), target)
    (target / "manifest.json").unlink()
    return target


@pytest.mark.parametrize(
    ("given", "name", "uri"),
    [
        ("models:/athanor-aligned@champion", "athanor-aligned@champion", "models:/athanor-aligned@champion"),
        ("after=models:/athanor-sft/3", "after", "models:/athanor-sft/3"),
        (f"s3://bucket/x/artifacts/dpo-model/{'a' * 64}", f"dpo-model-{'a' * 12}", None),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", None),
        ("/home/ada/models/mine", "mine", None),
        ("hf://org/repo/file.gguf", "file.gguf", None),
    ],
)
def test_a_model_is_called_by_its_address_or_by_a_name_of_its_own(given: str, name: str, uri: str | None) -> None:
    assert parse_addresses([given]) == [Address(name, uri or given)]


def test_two_models_of_one_name_are_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="two models would be called 'mine'") as raised:
        parse_addresses(["/a/mine", "/b/mine"])
    assert "first=/a/mine" in raised.value.advice


def test_a_name_that_is_empty_or_would_move_a_terminal_is_refused() -> None:
    for text in ("", "  ", "a\x1b[2J"):
        with pytest.raises(ConfigError, match="is empty or has control characters"):
            parse_addresses([text])


def test_an_artifact_is_verified_before_it_is_loaded(house: House, load: Load, tmp_path: Path) -> None:
    served = load()
    assert (served.kind, len(served.digest), served.context_length) == ("sft-model", 64, 64)
    copied = tmp_path / "store" / "artifacts" / "sft-model"
    shutil.copytree(local_path(house.uri(Stage.SFT)), copied / house.made[Stage.SFT].fingerprint)
    weights = copied / house.made[Stage.SFT].fingerprint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(StageError, match=r"model\.safetensors"):
        model_files(Address("x", str(weights.parent)), tmp_path / "cache")


def test_what_is_no_model_says_so(house: House, tmp_path: Path) -> None:
    cases = {
        house.uri(Stage.TOKENIZE): "which is no model",
        f"{house.store.root_uri}/artifacts/sft-model/{'0' * 64}": "there is no artifact",
        str(tmp_path / "nothing"): "model='.*nothing' does not exist",
    }
    for uri, message in cases.items():
        with pytest.raises(ConfigError, match=message) as raised:
            model_files(Address("x", uri), tmp_path / "cache")
        assert "models:/<name>@<alias>" in raised.value.advice


def test_a_plain_folder_is_served_too_and_answers_the_same(folder: Path, served: ServedModel) -> None:
    plain = loaded(folder)
    assert (plain.kind, plain.digest, plain.name) == ("", "", "model")
    ids = torch.tensor([[0, 5, 9]])
    with torch.no_grad():
        assert torch.equal(plain.model(input_ids=ids).logits, served.model(input_ids=ids).logits)


@pytest.mark.parametrize("place", ["artifacts/model", "artifacts/mine/model", "artifacts/ours/mine/model"])
def test_a_plain_folder_may_lie_below_one_called_artifacts(folder: Path, place: str, tmp_path: Path) -> None:
    target = tmp_path / "home" / place
    shutil.copytree(folder, target)
    assert model_files(Address("x", str(target)), tmp_path / "cache").folder == target


def test_an_artifact_without_its_manifest_is_no_plain_folder(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "home" / "artifacts" / "sft-model" / ("0" * 64)
    shutil.copytree(folder, target)
    with pytest.raises(ConfigError, match="there is no artifact"):
        model_files(Address("x", str(target)), tmp_path / "cache")


def test_answers_end_where_publisher_tokenizer_and_template_say(folder: Path, served: ServedModel) -> None:
    assert served.end_ids == {served.tokenizer.eos_id}
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [7, 8]}))
    assert loaded(folder).end_ids == {7, 8, served.tokenizer.eos_id}


def test_without_a_chat_template_a_question_is_plain_text_and_ends_the_answer(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    plain = loaded(folder)
    assert not plain.has_own_template
    assert plain.chat_stops == ("\nUser:", "\nSystem:")
    ids = plain.chat.encode_prompt([{"role": "user", "content": "sort?"}])
    text = plain.tokenizer.backend.decode(ids.tolist(), skip_special_tokens=True)
    assert text == "User: sort?\nAssistant:"


def test_a_context_that_the_model_does_not_have_is_refused(folder: Path) -> None:
    assert loaded(folder, context=32).context_length == 32
    with pytest.raises(ConfigError, match=r"--context=65, but .* at most 64 tokens"):
        loaded(folder, context=65)


def test_vllm_serves_one_model_where_it_can_run() -> None:
    one, two = [Address("a", "x")], [Address("a", "x"), Address("b", "y")]
    assert choose_vllm("auto", one, has_gpu=True, program="/bin/vllm")
    assert not choose_vllm("auto", two, has_gpu=True, program="/bin/vllm")
    assert not choose_vllm("auto", one, has_gpu=False, program="/bin/vllm")
    assert not choose_vllm("auto", one, has_gpu=True, program="")
    assert not choose_vllm("own", one, has_gpu=True, program="/bin/vllm")
    for backend, models, has_gpu, program, message in (
        ("vllm", two, True, "/bin/vllm", "serves one model, and 2 were given"),
        ("vllm", one, True, "", "no program `vllm`"),
        ("vllm", one, False, "/bin/vllm", "sees no GPU"),
        ("tgi", one, True, "/bin/vllm", "--backend='tgi' is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_vllm(backend, models, has_gpu=has_gpu, program=program)


def test_vllm_is_never_opened_to_other_machines() -> None:
    """Its key does not guard all that it answers."""
    one = [Address("a", "x")]
    for host in ("0.0.0.0", "::", "192.0.2.7"):
        assert not choose_vllm("auto", one, has_gpu=True, program="/bin/vllm", host=host)
        with pytest.raises(ConfigError, match="guards /v1 alone") as raised:
            choose_vllm("vllm", one, has_gpu=True, program="/bin/vllm", host=host)
        assert "a proxy in front" in raised.value.advice
    assert choose_vllm("vllm", one, has_gpu=True, program="/bin/vllm", host="::1")


def test_vllm_always_has_a_key_and_a_random_one_where_none_was_given() -> None:
    keys = {Listening().with_key().api_key for _ in range(2)}
    assert len(keys) == 2
    assert min(map(len, keys)) >= 32
    assert Listening(api_key="sesame").with_key().api_key == "sesame"


def test_the_command_of_vllm_serves_the_verified_folder_under_the_models_name(tmp_path: Path) -> None:
    """A stand-in for the program writes down how it was called."""
    program = tmp_path / "vllm"
    program.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >"$(dirname "$0")/called"\nprintf "$VLLM_API_KEY" >>"$(dirname "$0")/called"\n'
    )
    program.chmod(0o755)
    assert vllm_program({"ATHANOR_VLLM": str(program)}) == str(program)
    assert vllm_program({"PATH": str(tmp_path)}) == str(program)
    assert vllm_program({"PATH": str(tmp_path / "nothing")}) == ""
    with pytest.raises(ConfigError, match="is no program"):
        vllm_program({"ATHANOR_VLLM": str(tmp_path)})
    listening = Listening("127.0.0.1", 9000, "sesame")
    folder = tmp_path / "a model"
    command = vllm_command(
        str(program), Address("sft", "x"), folder, listening=listening, dtype="auto", context_length=4096
    )
    subprocess.run(
        command, env=vllm_environment(listening, {"PATH": "/usr/bin:/bin", "PYTHONPATH": "/ours"}), check=True
    )
    assert (tmp_path / "called").read_text().splitlines() == [
        "serve", str(folder), "--served-model-name", "sft", "--host", "127.0.0.1", "--port", "9000", "--dtype", "auto",
        "--generation-config", "vllm", "--allowed-origins", "[]", "--max-model-len", "4096", "sesame",
    ]  # fmt: skip
    assert "sesame" not in " ".join(command)
    assert "PYTHONPATH" not in vllm_environment(listening, {"PYTHONPATH": "/ours"})
