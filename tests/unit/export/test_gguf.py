"""GGUF by a converter that the operator names; a small script plays llama.cpp's."""

import stat
import sys
from pathlib import Path

import pytest

from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.export.gguf import SCRIPT, find_converter
from stages.export.request import Dtype, ExportRequest
from stages.export.write import export
from tests.unit.export.conftest import House

CONVERTS = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
asked = parser.parse_args()
dtype = json.loads((asked.model / "config.json").read_text())["dtype"]
assert (asked.model / "model.safetensors").is_file() and (asked.model / "tokenizer.json").is_file()
asked.outfile.write_bytes(b"GGUF" + f"{asked.outtype} of {dtype}".encode())
"""
UNKNOWN_TOKENIZER = """
import sys
print("WARNING: the BPE pre-tokenizer was not recognized!", file=sys.stderr)
sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
"""


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.delenv("LLAMA_CPP_PYTHON", raising=False)


def checkout(folder: Path, script: str) -> Path:
    folder.mkdir()
    (folder / SCRIPT).write_text(script)
    return folder


def asked(house: House, stage: Stage, to: Path, converter: Path | str = "") -> ExportRequest:
    return ExportRequest(address=house.made[stage].uri, to=to, gguf="q8_0", dtype=Dtype.BF16, converter=str(converter))


def test_the_converter_gets_the_exported_model_and_its_file_lies_beside(house: House, tmp_path: Path):
    made = export(asked(house, Stage.SFT, tmp_path / "out", checkout(tmp_path / "llama.cpp", CONVERTS)))
    assert (tmp_path / "out" / "model-q8_0.gguf").read_bytes() == b"GGUFq8_0 of bfloat16"
    assert "model-q8_0.gguf" in made.files
    assert "llama-cli -m model-q8_0.gguf" in (tmp_path / "out" / "README.md").read_text()


def test_the_environment_or_path_may_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = checkout(tmp_path / "llama.cpp", CONVERTS)
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    assert find_converter("").script == folder / SCRIPT
    monkeypatch.delenv("LLAMA_CPP")
    (folder / SCRIPT).chmod((folder / SCRIPT).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    found = find_converter("")
    assert found.script == folder / SCRIPT
    assert found.python == sys.executable


def test_without_a_converter_the_error_says_what_to_install_where(house: House, tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"needs llama\.cpp's convert_hf_to_gguf\.py, which is not on PATH"
    ) as refused:
        export(asked(house, Stage.SFT, tmp_path / "out"))
    for said in ("git clone https://github.com/ggml-org/llama.cpp", "LLAMA_CPP=", "LLAMA_CPP_PYTHON="):
        assert said in refused.value.advice
    with pytest.raises(ConfigError, match=r"--converter='/nowhere': there is no convert_hf_to_gguf\.py"):
        export(asked(house, Stage.SFT, tmp_path / "out", "/nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_a_reward_model_is_refused_with_the_reason(house: House, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is a reward model, and llama\.cpp's models write text"):
        export(asked(house, Stage.REWARD, tmp_path / "out"))


@pytest.mark.parametrize(
    ("script", "said", "advice"),
    [
        (UNKNOWN_TOKENIZER, "BPE pre-tokenizer was not recognized", "one with a tokenizer that the run trained cannot"),
        ("import surely_not_there", "ModuleNotFoundError", "LLAMA_CPP_PYTHON"),
        ("print('nothing to do')", "status 0 and wrote no GGUF file: nothing to do", "run the converter by hand"),
        (CONVERTS.replace('b"GGUF" +', ""), "wrote no GGUF file", "by hand"),
    ],
)
def test_a_converter_that_fails_is_quoted_and_leaves_no_folder(
    script: str, said: str, advice: str, house: House, tmp_path: Path
):
    script = script.replace('f"{asked.outtype}', 'f"half a file {asked.outtype}')
    with pytest.raises(ConfigError) as refused:
        export(asked(house, Stage.SFT, tmp_path / "out", checkout(tmp_path / "llama.cpp", script)))
    assert said in refused.value.message
    assert advice in refused.value.advice
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]
