"""Calls that could run what somebody else wrote. Most are ruff's to refuse; here are those that it does not know."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import REPOSITORY

ROOMS = ("dags", "operators", "stages", "infra")
SOURCES = sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))
# modules that unpickle, and those that unpack archives: whoever needs one has to say here how it is kept in
FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile", "zipfile", "jsonpickle"}


def violations(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (f"import {n.name}" for n in names if n.name.split(".")[0] in FORBIDDEN)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN:
                yield f"import {module}"
            case ast.Call(func=ast.Attribute(attr=attribute, value=owner), keywords=keywords):
                given = {keyword.arg: keyword.value for keyword in keywords}
                yield from _call(f"{ast.unparse(owner)}.{attribute}", given)


def _call(name: str, given: dict[str | None, ast.expr]) -> Iterator[str]:
    def says(keyword: str, value: bool) -> bool:
        found = given.get(keyword)
        return isinstance(found, ast.Constant) and found.value is value

    def is_asked_for() -> bool:
        """Whether the one function that knows what an administrator allowed decides."""
        found = given.get("trust_remote_code")
        return isinstance(found, ast.Call) and ast.unparse(found.func) == "may_run_code"

    if name == "torch.load" and not says("weights_only", True):
        yield f"{name} without weights_only=True"
    if name.endswith(".from_pretrained") and "trust_remote_code" not in given:
        yield f"{name} without trust_remote_code=False"
    if "trust_remote_code" in given and not (says("trust_remote_code", False) or is_asked_for()):
        yield f"{name} with trust_remote_code"
    if "allow_pickle" in given and not says("allow_pickle", False):
        yield f"{name} with allow_pickle"
    if "verify" in given and says("verify", False):
        yield f"{name} with verify=False"
    if name.endswith((".unpack_archive", ".extractall")):
        yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_source_file_opens_a_door(path: Path) -> None:
    assert list(violations(path.read_text())) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "AutoModel.from_pretrained('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "load_dataset.load('x', trust_remote_code=flag)",
        "import pickle",
        "from joblib import load",
        "import tarfile",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import shutil\nshutil.unpack_archive('x')",
        "import httpx\nhttpx.Client(verify=False)",
    ],
)
def test_a_planted_call_is_found(planted: str) -> None:
    assert len(list(violations(planted))) == 1


@pytest.mark.parametrize(
    ("planted", "rule"),
    [
        ("eval(input())", "S307"),
        ("exec(input())", "S102"),
        ("import pickle\n\npickle.loads(b'')", "S301"),
        ("import marshal\n\nmarshal.loads(b'')", "S302"),
        ("import subprocess\n\nsubprocess.run(input(), shell=True)", "S602"),
        ("import os\n\nos.system(input())", "S605"),
        ("import yaml\n\nyaml.load(input())", "S506"),
        ("def find(cursor, name):\n    cursor.execute(f\"SELECT * FROM run WHERE name = '{name}'\")", "S608"),
        ("import requests\n\nrequests.get('https://x', verify=False, timeout=1)", "S501"),
        ("import jinja2\n\njinja2.Environment(autoescape=False)", "S701"),
        ("import tarfile\n\ntarfile.open('x').extractall()", "S202"),
        ("HOST = '0.0.0.0'", "S104"),
    ],
)
def test_ruff_refuses_the_others_as_part_of_make_check(planted: str, rule: str) -> None:
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ruff"),
            "check",
            "--output-format",
            "concise",
            "--stdin-filename",
            "stages/x.py",
            "-",
        ],
        cwd=REPOSITORY,
        input=planted,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f" {rule} " in done.stdout
