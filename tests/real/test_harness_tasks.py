"""Task files of lm-evaluation-harness: what runs, what they may not do, and that items stay items."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed; `make test-real` installs the extra `eval`"
)

from stages.config.benchmarks import parse_benchmark
from stages.config.errors import ConfigError, StageError
from stages.data.sources.benchmarks import snapshot_benchmark
from stages.judge.bench import open_bench
from stages.judge.benchmarks.facets import Facet
from stages.judge.benchmarks.harness import task_suites
from stages.judge.suite import Subject
from stages.models.foreign_code import ALLOWED, code_digest
from tests.judging import evaluation, make_world
from tests.real.harness_tasks import write_tasks

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_bench(evaluation(make_world(tmp_path_factory.mktemp("run")))).subjects.open("sft")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tasks"
    made.mkdir()
    write_tasks(made)
    return made


Load = Callable[..., dict[str, Facet]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loaded(path: Path | str, options: str = "") -> dict[str, Facet]:
        found = task_suites(parse_benchmark(f"{path}{options}"), tmp_path / "copy")
        return {suite.name: suite for suite in found}

    return loaded


def changed(path: Path, **changes: Any) -> Path:
    task = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}))
    return path


def test_a_task_is_a_suite_for_each_metric_and_filter(folder: Path, load: Load) -> None:
    made = load(folder / "small_products.yaml")
    assert {name: (suite.metric, suite.chance, suite.items) for name, suite in made.items()} == {
        "small_products": ("acc", 0.25, 20),
        "small_products-acc_norm": ("acc_norm", 0.25, 20),
    }
    assert list(load(folder / "small_sums.yaml")) == ["small_sums", "small_sums-exact_match-first-number"]
    sentences = load(folder / "small_sentences.yaml")
    assert {name: suite.metric for name, suite in sentences.items()} == {
        "small_sentences": "acc",
        "small_sentences-perplexity": "loglikelihood",
    }


def test_one_metric_and_some_items_can_be_chosen(folder: Path, load: Load, subject: Subject) -> None:
    whole = load(folder / "small_products.yaml", "#metric=acc_norm")
    assert {name: suite.metric for name, suite in whole.items()} == {"small_products": "acc_norm"}
    (some,) = load(folder / "small_sentences.yaml", "#metric=acc&limit=3").values()
    assert [score.item for score in some.measure(subject).scores] == ["0", "5", "11"]
    with pytest.raises(ConfigError, match=r"has no metric='f1'; it has acc, acc_norm"):
        load(folder / "small_products.yaml", "#metric=f1")


def test_items_that_do_not_fit_are_counted_and_the_others_are_scored(
    folder: Path, load: Load, subject: Subject
) -> None:
    with (folder / "sentences.jsonl").open("a") as rows:
        rows.write('{"start": "' + "word " * 300 + '", "end": "x"}\n')
    suite = load(folder / "small_sentences.yaml")["small_sentences"]
    found = suite.measure(subject)
    assert found.skipped == {"longer_than_context": 1}
    assert [score.item for score in found.scores] == [str(number) for number in range(12)]
    # Two examples before the question do not fit the small model at all.
    none = load(folder / "small_products.yaml")["small_products"].measure(subject)
    assert len(none.scores) + none.skipped.total() == 20


def test_a_model_measured_again_gets_the_same(folder: Path, load: Load, subject: Subject) -> None:
    changed(folder / "small_products.yaml", num_fewshot=1, doc_to_text="{{a}} x {{b}}:")
    suite = load(folder / "small_products.yaml")["small_products-acc_norm"]
    first = suite.shared.runs.run(subject)
    again = suite.shared.runs.run(subject)
    assert first == again


def test_a_chat_needs_a_template_and_uses_it(folder: Path, load: Load, subject: Subject) -> None:
    changed(folder / "small_sums.yaml", doc_to_text="{{a}}+{{b}}", generation_kwargs={"until": [], "max_gen_toks": 4})
    suite = load(folder / "small_sums.yaml", "#chat=true")["small_sums"]
    found = suite.measure(subject)
    assert len(found.scores) == 12
    bare = replace(subject, tokenizer=replace(subject.tokenizer, chat_template=""), identity="bare")
    assert suite.measure(bare).skipped == {"no_chat_template": 12}


def test_the_digest_covers_the_data_and_the_settings(folder: Path, load: Load) -> None:
    path = folder / "small_sums.yaml"
    before, source = load(path)["small_sums"].digest, snapshot_benchmark(str(path))
    assert load(path)["small_sums"].digest == before
    (folder / "sums.jsonl").write_text('{"a": 1, "b": 2, "sum": 3}\n')
    assert snapshot_benchmark(str(path)) != source
    after = load(path)["small_sums"].digest
    assert after != before
    changed(path, doc_to_text="{{a}} and {{b}}")
    assert load(path)["small_sums"].digest != after


def test_a_group_is_all_its_tasks_and_files_may_include_others(folder: Path, load: Load) -> None:
    (folder / "all.yaml").write_text("group: all\ntask: [small_sums, small_sentences]\n")
    assert {"small_sums", "small_sentences"} <= load(folder / "all.yaml").keys()
    (folder / "more.yaml").write_text("include: small_sums.yaml\ntask: more\n")
    assert "more" in load(folder / "more.yaml")
    (folder / "loop.yaml").write_text("include: loop.yaml\ntask: loop\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load(folder / "loop.yaml")
    (folder / "none.yaml").write_text("group: none\ntask: [nowhere]\n")
    with pytest.raises(ConfigError, match="'nowhere', which no file of its folder defines"):
        load(folder / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "/etc/passwd"}}}, "no file of the task's folder"),
        ({"dataset_kwargs": {"data_files": {"test": "../other.jsonl"}}}, "no file of the task's folder"),
        ({"dataset_kwargs": {"data_files": {"test": "https://x/y.jsonl"}}}, "data file 'https://x/y.jsonl'"),
        ({"dataset_path": "pandas"}, "They are for files"),
        ({"dataset_path": "pandas", "dataset_kwargs": None}, "names a file format"),
        ({"dataset_path": None}, "dataset_path=None"),
        ({"test_split": "nowhere"}, "makes no task"),
        ({"doc_to_text": "{{missing}}"}, "makes no task"),
        ({"include": "../outside.yaml"}, "no file of the task's folder"),
        ({"unsafe_code": True}, "unsafe_code"),
        ({"use_prompt": "promptsource:x"}, "use_prompt"),
        ({"metric_list": [{"metric": "own_script"}]}, "looked for as a script"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "looked for as a script"),
        ({"generation_kwargs": {"until": [], "do_sample": True, "top_p": 0.5}}, "top_p"),
    ],
)
def test_what_a_task_file_may_not_do(folder: Path, load: Load, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(StageError) as error:
        load(changed(folder / "small_sums.yaml", **changes))
    assert told in f"{error.value.message} {error.value.advice}"


def test_a_template_cannot_reach_out_of_its_sandbox(folder: Path, load: Load, tmp_path: Path) -> None:
    reaching = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ConfigError, match="SecurityError"):
        load(changed(folder / "small_sums.yaml", doc_to_text=reaching))


def test_code_next_to_a_task_runs_only_if_its_digest_is_allowed(
    folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    monkeypatch.delenv(ALLOWED, raising=False)
    (folder / "own.py").write_text("def text(doc):\n    return f\"{doc['a']}+{doc['b']}=\"\n")
    path = changed(folder / "small_sums.yaml", doc_to_text=None, generation_kwargs={"until": [], "max_gen_toks": 2})
    path.write_text(path.read_text() + "doc_to_text: !function own.text\n")
    with pytest.raises(ConfigError, match=r"brings code \(own.py\)") as error:
        load(path)
    digest = code_digest(folder)
    assert digest in error.value.message
    monkeypatch.setenv(ALLOWED, digest)
    assert len(load(path)["small_sums"].measure(subject).scores) == 12
    (folder / "own.py").write_text("def text(doc):\n    return 'changed'\n")
    with pytest.raises(ConfigError, match="brings code"):
        load(path)


BROKEN = """
def results(doc, results):
    if doc["a"] == FAILS_AT:
        raise KeyError("no such field")
    return {"exact_match": None if doc["a"] == NONE_AT else 1.0}
"""


@pytest.mark.parametrize(("fails_at", "none_at"), [("first", "nowhere"), ("nowhere", "first")])
def test_a_document_on_which_a_task_breaks_costs_its_suite_or_itself(
    folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch, subject: Subject, fails_at: str, none_at: str
) -> None:
    short = {"doc_to_text": "{{a}}+{{b}}=", "generation_kwargs": {"until": [], "max_gen_toks": 2}, "filter_list": None}
    path = changed(folder / "small_sums.yaml", **short)
    first = json.loads((folder / "sums.jsonl").read_text().splitlines()[0])["a"]
    code = BROKEN.replace("FAILS_AT", repr(first) if fails_at == "first" else "None")
    (folder / "own.py").write_text(code.replace("NONE_AT", repr(first) if none_at == "first" else "None"))
    path.write_text(path.read_text() + "process_results: !function own.results\n")
    monkeypatch.setenv(ALLOWED, code_digest(folder))
    suite = load(path)["small_sums"]
    found = suite.measure(subject)
    assert len(found.scores) + found.skipped.total() == len(suite) == 12
    if fails_at == "first":
        assert found.skipped == {"task_failed_KeyError": 12}
        assert not found.is_final
    else:
        assert found.skipped == {"value_is_no_number": 3}
        assert found.is_final


@pytest.mark.parametrize("function", ["os.system", "subprocess.run", "nowhere.text"])
def test_functions_of_installed_modules_are_not_called(folder: Path, load: Load, function: str) -> None:
    path = changed(folder / "small_sums.yaml", doc_to_text=None)
    path.write_text(path.read_text() + f"doc_to_text: !function {function}\n")
    with pytest.raises(ConfigError, match="no file of the task's folder"):
        load(path)


def test_yaml_that_makes_objects_is_refused(folder: Path, load: Load) -> None:
    (folder / "bad.yaml").write_text("task: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="is no YAML"):
        load(folder / "bad.yaml")


def test_a_task_of_the_package_that_there_is_not(load: Load) -> None:
    with pytest.raises(ConfigError, match="has no task 'arc_eazy'"):
        load("lm-eval://arc_eazy")


def test_values_are_numbers_of_single_items(folder: Path, load: Load, subject: Subject) -> None:
    rolling = {
        "task": "rolling",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "sentences.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{start}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    }
    (folder / "rolling.yaml").write_text(yaml.safe_dump(rolling))
    made = load(folder / "rolling.yaml")
    assert list(made) == ["rolling"]  # word_perplexity is a number of the whole text only
    found = [score.value for score in made["rolling"].measure(subject).scores]
    assert len(found) == 12
    assert np.isfinite(found).all()
    assert min(found) > 0
