"""Addresses of benchmarks: what is understood, and what is refused with the way out."""

import pytest
from pydantic import ValidationError

from stages.config.benchmarks import BenchmarkFormat, BuiltIn, Rule, parse_benchmark, parse_benchmarks
from stages.config.closing import EvaluateConfig
from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.request import SourceKind
from stages.config.resolve import resolve


def test_options_follow_the_address_and_may_be_percent_encoded() -> None:
    made = parse_benchmark("s3://b/gsm#1.jsonl.gz#rule=regex&pattern=%23%23 (\\d%2B)&name=gsm&limit=20&chat=true")
    assert (made.uri, made.rule, made.pattern, made.suite) == ("s3://b/gsm#1.jsonl.gz", Rule.REGEX, "## (\\d+)", "gsm")
    assert (made.limit, made.chat, made.built_in) == (20, True, None)


@pytest.mark.parametrize(
    ("address", "suite"),
    [
        ("/data/arc_easy.jsonl.gz", "arc_easy"),
        ("s3://bucket/My benchmarks/", "My-benchmarks"),
        ("hf://org/set?split=test", "set"),
        ("lm-eval://arc_easy", "arc_easy"),
        ("refusals", "refusals"),
        ("/data/x.csv#name=y", "y"),
    ],
)
def test_a_suite_is_called_by_its_file_unless_it_has_a_name(address: str, suite: str) -> None:
    assert parse_benchmark(address).suite == suite


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("/x.jsonl#rul=number", "unknown option 'rul'; did you mean 'rule'?"),
        ("/x.jsonl#rule=fuzzy", "'exact', 'number', 'regex' or 'function'"),
        ("/x.jsonl#rule=regex", "rule=regex and pattern= belong together"),
        ("/x.jsonl#pattern=a", "rule=regex and pattern= belong together"),
        ("/x.jsonl#rule=regex&pattern=(", "no regular expression"),
        ("/x.jsonl#rule=function&function=os.system", "not of the form module:name"),
        ("/x.jsonl#name=a/b", "name='a/b' may hold letters"),
        ("/x.jsonl#limit=-1", "limit"),
        ("/x.jsonl#metric=acc", "metric= is for tasks"),
        ("lm-eval://arc_easy#judge=true", "judge=true is for refusals"),
        ("toxicity#judge=true", "judge=true is for refusals"),
        ("/x.yaml#format=choices", "format= is for files of rows"),
        ("refusals#rule=exact", "rule= is for files of rows"),
        ("lm-eval://", "names no task"),
        ("#name=x", "names no file"),
    ],
)
def test_what_cannot_be_meant_is_refused(address: str, told: str) -> None:
    with pytest.raises(ValueError, match="benchmark") as error:
        parse_benchmark(address)
    assert told in str(error.value)


def test_two_suites_need_two_names() -> None:
    with pytest.raises(ValueError, match=r"\['a', .*\] are the names of more than one suite"):
        parse_benchmarks(["/x/a.jsonl", "/y/a.csv"])
    with pytest.raises(ValueError, match=r"\['language'\] are names of suites that every evaluation has"):
        parse_benchmarks(["/x/language.jsonl"])


def test_an_evaluation_without_benchmarks_has_the_fingerprint_that_it_had() -> None:
    assert "benchmarks" not in EvaluateConfig().identity()
    assert EvaluateConfig(benchmarks=("refusals",)).identity()["benchmarks"] == ["refusals"]
    with pytest.raises(ValidationError, match="unknown option"):
        EvaluateConfig(benchmarks=("/x#y=1",))


def test_the_forms_benchmarks_are_sources_of_evaluate_alone_and_of_their_own_kind() -> None:
    config = resolve({"recipe": "tiny", "benchmarks": ["refusals", "/data/a.jsonl#name=b", "lm-eval://arc_easy"]})
    sources = config.stage_sources(Stage.EVALUATE)
    assert [(source.role, source.kind, source.uri) for source in sources] == [
        ("benchmarks", SourceKind.BENCHMARK, "/data/a.jsonl"),
        ("benchmarks", SourceKind.BENCHMARK, "lm-eval://arc_easy"),
    ]
    assert not config.stage_sources(Stage.SFT)
    assert config.evaluate.parsed_benchmarks[0].built_in is BuiltIn.REFUSALS


@pytest.mark.parametrize(("address", "told"), [("/etc/passwd", "not open to sources"), ("/a#format=x", "format")])
def test_a_benchmark_that_cannot_be_used_is_refused_when_the_run_starts(address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve({"recipe": "tiny", "benchmarks": [address]})


def test_every_format_has_a_name_that_the_option_takes() -> None:
    for form in BenchmarkFormat:
        assert parse_benchmark(f"/x#format={form}").format is form
