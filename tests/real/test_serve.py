"""The published model is served out of its GGUF file, and answers as transformers' own generation does."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from stages.serve.address import parse_addresses
from stages.serve.loading import ServedModel, load_model, model_files
from tests.serving import serving

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1800)]

QUESTIONS = ("What is the capital of France?", "Write one sentence about a dog.", "Say hello in German.")


@pytest.fixture(scope="module")
def served(model_address: str, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    (address,) = parse_addresses([f"smol={model_address}"])
    files = model_files(address, tmp_path_factory.mktemp("cache"))
    return load_model(address, files, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def url(served: ServedModel) -> Iterator[str]:
    with serving([served]) as url:
        yield url


def ask(url: str, question: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "smol", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
    response = httpx.post(f"{url}/v1/chat/completions", json={**asked, **body}, timeout=600)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def of_transformers(served: ServedModel, folder: Path, question: str) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = served.model.generate(**ids, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_knows_a_capital_and_stops_when_it_has_said_so(url: str) -> None:
    answer = ask(url, QUESTIONS[0])
    assert "Paris" in answer["message"]["content"]
    assert answer["finish_reason"] == "stop"


def test_answers_are_those_of_transformers_alone_and_together(url: str, served: ServedModel) -> None:
    folder = Path(served.model.name_or_path)
    expected = [of_transformers(served, folder, question) for question in QUESTIONS]
    assert [ask(url, question)["message"]["content"] for question in QUESTIONS] == expected
    with ThreadPoolExecutor(3) as clients:
        together = list(clients.map(lambda question: ask(url, question)["message"]["content"], QUESTIONS))
    assert together == expected
