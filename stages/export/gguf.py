"""GGUF for llama.cpp and what is built on it, made by llama.cpp's own converter, which the operator installs.

The converter is a program of another project with requirements of its own, so it runs in a process of its own.
"""

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from stages.config.errors import ConfigError
from stages.config.text import one_line

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE, PYTHON_VARIABLE = "LLAMA_CPP", "LLAMA_CPP_PYTHON"
_MAGIC = b"GGUF"
_LAST_LINES = 8
_INSTALL = (
    "Install it: `git clone https://github.com/ggml-org/llama.cpp`, and its requirements "
    "(requirements/requirements-convert_hf_to_gguf.txt) in an environment of their own. Then set "
    f"{VARIABLE}=/path/to/llama.cpp and {PYTHON_VARIABLE}=/path/to/that/environment/bin/python, or give --converter."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converter:
    """llama.cpp's script, and the Python that has its requirements."""

    script: Path
    python: str


def find_converter(named: str) -> Converter:
    """The converter that the option or the environment names, else the one on PATH; ConfigError says how to get it."""
    python = os.environ.get(PYTHON_VARIABLE) or sys.executable
    if shutil.which(python) is None:
        raise ConfigError(
            f"{PYTHON_VARIABLE}={python!r} is no program", advice="Name a Python with the converter's requirements."
        )
    where = named or os.environ.get(VARIABLE, "")
    if not where:
        found = shutil.which(SCRIPT)
        if found is None:
            raise ConfigError(f"--gguf needs llama.cpp's {SCRIPT}, which is not on PATH", advice=_INSTALL)
        return Converter(Path(found).absolute(), python)
    path = Path(os.path.expanduser(where)).absolute()
    script = path / SCRIPT if path.is_dir() else path
    if not script.is_file():
        source = "--converter" if named else VARIABLE
        raise ConfigError(f"{source}={where!r}: there is no {SCRIPT} at {script}", advice=_INSTALL)
    return Converter(script, python)


def convert(folder: Path, outfile: Path, *, outtype: str, converter: Converter) -> None:
    """Write the model in `folder` as one GGUF file; raises ConfigError with the converter's last words."""
    command = [converter.python, str(converter.script), str(folder), "--outfile", str(outfile), "--outtype", outtype]
    logger.info("converting to GGUF: %s", " ".join(command))
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode == 0 and _is_gguf(outfile):
        return
    said = [one_line(line, at_most=300) for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    raise ConfigError(
        f"llama.cpp's converter ended with status {done.returncode} and wrote "
        f"{'no GGUF file' if done.returncode == 0 else 'none'}: {' | '.join(said[-_LAST_LINES:]) or 'it said nothing'}",
        advice=_advice(done.stdout + done.stderr),
    )


def _is_gguf(path: Path) -> bool:
    """A converter that was stopped half-way leaves a file without its magic number, or none."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _advice(said: str) -> str:
    if "pre-tokenizer was not recognized" in said:
        return (
            "llama.cpp knows the tokenizers of published models only. A model that started from one of those, with its "
            "tokenizer, can be converted; one with a tokenizer that the run trained cannot, unless it is added to "
            "llama.cpp's list (convert_hf_to_gguf_update.py)."
        )
    if "is not supported" in said or "NotImplementedError" in said:
        return "This version of llama.cpp does not know the architecture: update it, or export without --gguf."
    if "ModuleNotFoundError" in said or "ImportError" in said:
        return f"Its requirements are missing: set {PYTHON_VARIABLE} to a Python that has them. {_INSTALL}"
    return "The folder itself is a complete model: export it without --gguf, and run the converter by hand to see more."
