"""The page about suites, champion and candidate, gates and the gold scorer: what it says, and where the numbers are."""

import base64
import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts.addresses import open_store
from stages.config.closing import ReportConfig
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.judge.scores import write_scores
from stages.judge.suite import Score
from stages.report import run
from stages.reporting.figures import figure_data
from stages.reporting.interval_plot import Estimate, interval_plot
from stages.reporting.page import render_page
from stages.reporting.story import read_gates, read_story
from tests.pipeline_records import (
    EVALUATION,
    context_for,
    publish_artifact,
    publish_run,
    refs_for,
    request_for,
    run_info,
)
from tests.unit.reporting.test_report import CSV, PROMOTION, _Page


def score(value: float, width: float, items: int = 200, **skipped: int) -> dict[str, Any]:
    return {"value": value, "low": value - width, "high": value + width, "items": items, "skipped": skipped}


def compared(role: str, against: str, suite: str, difference: float, width: float) -> dict[str, Any]:
    found = {"difference": difference, "low": difference - width, "high": difference + width, "level": 0.05}
    return {
        "role": role,
        "against": against,
        "suite": suite,
        **found,
        "p": 0.01,
        "items": 200,
        "clusters": 180,
        "needed_items": 417,
    }


SUITES: dict[str, Any] = {
    "suites": {
        "questions": {
            "metric": "accuracy",
            "better": "higher",
            "chance": 0.25,
            "digest": "q" * 64,
            "items": 210,
            "roles": {
                "base": score(0.27, 0.05),
                "sft": score(0.38, 0.06, too_long=10),
                "ppo": score(0.52, 0.06),
                "champion": score(0.44, 0.06),
            },
        },
        "language": {
            "metric": "bits_per_byte",
            "better": "lower",
            "chance": None,
            "digest": "l" * 64,
            "items": 90,
            "roles": {"sft": score(1.2, 0.02), "ppo": score(1.31, 0.02), "champion": score(1.21, 0.02)},
        },
        "gold": {
            "metric": "reward",
            "better": "higher",
            "items": 128,
            "roles": {"sft": score(0.1, 0.1), "ppo": score(-0.2, 0.1)},
        },
        "score": {
            "metric": "reward",
            "better": "higher",
            "items": 128,
            "roles": {"sft": score(-0.5, 0.1), "ppo": score(0.3, 0.1)},
        },
    },
    "comparisons": [
        compared("ppo", "sft", "questions", 0.14, 0.05),
        compared("ppo", "champion", "questions", 0.08, 0.05),
        compared("ppo", "champion", "language", 0.1, 0.02),
    ],
    "champion": {"name": "demo-aligned", "version": "7", "fingerprint": "f" * 64, "digest": "d" * 64, "uri": "u"},
}
JUDGED = {**EVALUATION, **SUITES}
DECIDED = {
    **PROMOTION,
    "promoted": False,
    "comparison": "champion",
    "rulings": [
        {
            "role": "ppo",
            "opponent": "champion",
            "level": 0.05,
            "passed": False,
            "reason": "a guard is not held",
            "primary": {
                "suite": "questions",
                "margin": 0.0,
                "passed": True,
                "why": "it is better",
                "metric": "accuracy",
                "better": "higher",
                "compared": SUITES["comparisons"][1],
            },
            "guards": [
                {
                    "suite": "language",
                    "margin": 0.02,
                    "passed": False,
                    "why": "over its margin",
                    "metric": "bits_per_byte",
                    "better": "lower",
                    "compared": SUITES["comparisons"][2],
                }
            ],
        }
    ],
}
GATE = {
    "stage": "reward",
    "artifact": {"kind": "reward-model", "uri": "u", "fingerprint": "f", "digest": "d"},
    "outcome": "failed",
    "override": {"by": "ada", "reason": "a rehearsal"},
    "checks": [
        {"name": "reload", "outcome": "passed", "found": "logits differ by 0", "allowed": "at most 1e-5", "advice": ""},
        {
            "name": "accept/accuracy_low",
            "outcome": "failed",
            "found": "0.47",
            "allowed": "> 0.5",
            "advice": "Bring more pairs.",
        },
        {"name": "best_of_n", "outcome": "skipped", "found": "there is no gold scorer"},
    ],
    "tables": {
        "accuracy_by_source": {"s3://b/<b>": {"pairs": 12, "accuracy": 0.5}, "other": {"pairs": 3}},
        "best_of_n": [{"n": 1, "gain": 0.0}, {"n": 4, "gain": 0.25}],
        "odd": 7,
    },
    "at": "2026-11-29T12:00:00+00:00",
}


def make(
    root: Path,
    *,
    evaluation: Any = JUDGED,
    promotion: Any = DECIDED,
    gates: Any = None,
    scores: Any = None,
    damaged: str = "",
) -> str:
    store, made = publish_run(root, evaluation=evaluation, promotion=promotion)
    if scores:
        folder = root / f"content-{Stage.EVALUATE.value}"
        write_scores(folder, scores)
        if damaged:
            (folder / damaged).write_bytes(b"PAR1 no table")
        made[Stage.EVALUATE], _ = publish_artifact(
            store, Stage.EVALUATE, refs_for(Stage.EVALUATE, made), folder, salt="with-scores"
        )
    for stage, gate in (gates or {}).items():
        text = gate if isinstance(gate, str) else json.dumps(gate)
        store.write_bytes(f"runs/{run_info().run_id}/gate_{stage}/gate.json", text.encode())
    config = ReportConfig(title="demo run", max_samples=3)
    context = context_for(request_for(Stage.REPORT, store, refs_for(Stage.REPORT, made), config), store, config, root)
    run(context)
    context.progress.close()
    return (context.output_dir / "report.html").read_text()


def rows_of(page: str, caption: str) -> list[list[str]]:
    table = next(
        found for found in re.findall(r"<table.*?</table>", page, re.DOTALL) if f">{caption}</caption>" in found
    )
    return [
        [" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
    ]


def files_of(page: str) -> dict[str, list[dict[str, str]]]:
    """The CSV files of a page by name."""
    found = {}
    for address, name in re.findall(rf'href="{re.escape(CSV)}([^"]*)" download="([^"]*)"', page):
        found[name] = list(csv.DictReader(io.StringIO(base64.b64decode(address).decode())))
    return found


def test_every_suite_and_model_stands_in_one_table_with_its_interval(tmp_path: Path) -> None:
    rows = rows_of(make(tmp_path), "Suites")
    assert rows[0] == ["suite", "metric", "chance", "items", "Base", "SFT", "PPO", "Champion (version 7)"]
    assert rows[1] == [
        "questions",
        "accuracy ↑",
        "0.25",
        "210",
        "0.27 0.22 to 0.32",
        "0.38 0.32 to 0.44",
        "0.52 0.46 to 0.58",
        "0.44 0.38 to 0.5",
    ]
    assert rows[2][:5] == ["language", "bits_per_byte ↓", "", "90", "–"]


def test_only_a_whole_interval_above_chance_is_marked(tmp_path: Path) -> None:
    page = make(tmp_path)
    row = next(row for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL) if ">questions</th>" in row)
    values = re.findall(r'<td class="([^"]*)">', row)[3:]
    assert ["best" in value for value in values] == [False, True, True, True]  # 0.22 to 0.32 holds 0.25


def test_accuracy_on_pairs_stands_apart_by_reason(tmp_path: Path) -> None:
    found = [("reward", "reward", "harmless", 0.4), ("dpo", "preferences", "helpful", 0.9)]
    found += [("reward", "reward", "helpful", 0.8), ("dpo", "preferences", "none", 0.5)]
    rows = [
        {"role": role, "suite": suite, "reason": reason, "value": value, "low": value - 0.2, "high": 1.0, "items": 9}
        for role, suite, reason, value in found
    ]
    page = make(tmp_path / "reasons", evaluation={**JUDGED, "by_reason": rows})
    told = rows_of(page, "Held-out pairs by reason")
    assert told[0] == ["model", "suite", "helpful", "harmless", "no reason"]
    assert told[1] == ["Reward model", "reward", "0.8 0.6 to 1, 9 pairs", "0.4 0.2 to 1, 9 pairs", "–"]
    assert told[2] == ["DPO", "preferences", "0.9 0.7 to 1, 9 pairs", "–", "0.5 0.3 to 1, 9 pairs"]
    cells = next(row for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL) if "0.4" in row and "9 pairs" in row)
    assert ["best" in value for value in re.findall(r'<td class="([^"]*)">', cells)][-3:] == [True, False, False]
    assert "Held-out pairs by reason" not in make(tmp_path / "none")


def test_what_a_model_was_not_measured_on_is_counted_with_its_reason(tmp_path: Path) -> None:
    rows = rows_of(make(tmp_path), "questions, accuracy")
    assert rows[2] == ["SFT", "0.38", "0.32", "0.44", "200", "10", "too_long 10"]


def test_candidate_and_champion_are_compared_with_the_sign_that_counts(tmp_path: Path) -> None:
    page = make(tmp_path)
    rows = rows_of(page, "Compared item by item")
    assert rows[1][:5] == ["PPO", "Champion (version 7)", "questions", "accuracy ↑", "+0.08 +0.03 to +0.13"]
    assert rows[2][2:5] == ["language", "bits_per_byte ↓", "+0.1 +0.08 to +0.12"]
    assert rows[3][1] == "SFT"
    assert rows[1][5:] == ["0.01", "200", "180", "417"]
    lines = [row for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL) if "Champion (version 7)</span>" in row]
    assert "num best" in lines[0]
    assert "num worst" in lines[1]  # more bits per byte are worse


def test_the_decision_is_shown_as_the_approver_saw_it(tmp_path: Path) -> None:
    rows = rows_of(make(tmp_path), "The decision")
    assert rows[0][-1] == "verdict"
    assert rows[1][:4] == ["PPO", "Champion", "questions, accuracy ↑", "+0.08"]
    assert rows[1][-1] == "passes"
    assert rows[2][-1] == "not held"


def test_a_judge_stands_next_to_what_it_is_worth(tmp_path: Path) -> None:
    judge = {
        "endpoint": "",
        "model": "judge-1",
        "method": "generation",
        "agreement": {"accuracy": 0.52, "low": 0.46, "high": 0.58, "items": 90, "decided": 0.8, "skipped": {}},
        "better_than_chance": False,
        "against": "sft",
        "length_controlled": {"ppo": {"win_rate": 0.55, "low": 0.5, "high": 0.6, "per_length": 0.1}},
    }
    page = make(tmp_path, evaluation={**JUDGED, "judge": judge})
    rows = rows_of(page, "The judge that is a model")
    assert rows[1][1:] == ["0.52 0.46 to 0.58", "90"]
    assert rows[4] == ["PPO wins against SFT, at equal length", "0.55 0.5 to 0.6", ""]
    assert "not shown to agree better than chance" in page
    silent = {**judge, "agreement": {}, "length_controlled": {}}
    assert "The judge that is a model" not in make(tmp_path / "b", evaluation={**JUDGED, "judge": silent})


def test_the_difference_that_decided_stands_at_the_top(tmp_path: Path) -> None:
    top = make(tmp_path).split("<nav")[0]
    assert "PPO minus Champion (version 7)" in top
    assert "+0.03 to +0.13, accuracy of questions, 200 items" in top


def test_gates_are_shown_with_both_numbers_and_who_let_them_pass(tmp_path: Path) -> None:
    page = make(tmp_path, gates={"reward": GATE, "curate": {**GATE, "outcome": "passed", "override": None}})
    rows = rows_of(page, "Gates of the run")
    assert [row[0] for row in rows[1:]] == ["curate", "reward"]
    assert rows[2][1:5] == ["failed", "1", "1", "1"]
    assert rows[2][5] == "accept/accuracy_low: 0.47, allowed: > 0.5".replace(">", "&gt;")
    assert rows[2][6] == "ada: a rehearsal"
    assert "Bring more pairs." in page
    assert "there is no gold scorer" in page
    assert "s3://b/&lt;b&gt;" in page
    assert "s3://b/<b>" not in page
    assert len(re.findall(r"<details open>", page)) == 1  # the failed one
    assert rows_of(page, "Best of n") == [["n", "gain"], ["1", "0"], ["4", "0.25"]]


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"outcome": 3}', '{"checks": [{}], "outcome": "passed"}'])
def test_a_damaged_gate_record_is_left_out_and_named_in_the_log(
    tmp_path: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    page = make(tmp_path, gates={"reward": damaged, "sft": GATE})
    assert [row[0] for row in rows_of(page, "Gates of the run")[1:]] == ["sft"]
    assert "gate_reward/gate.json" in caplog.text


def test_no_gates_is_no_section(tmp_path: Path) -> None:
    assert 'id="gates"' not in make(tmp_path)
    assert read_gates(open_store((tmp_path / "empty").as_uri()), "none") == {}


def test_the_numbers_of_every_figure_are_behind_a_click_and_in_a_file(tmp_path: Path) -> None:
    page = make(tmp_path)
    files = files_of(page)
    assert page.count('<svg class="plot"') == page.count('<details class="data">') == len(files)
    suite = files["suite-questions.csv"]
    assert [row["model"] for row in suite] == ["Base", "SFT", "PPO", "Champion (version 7)"]
    assert float(suite[2]["low"]) == pytest.approx(0.46)
    curve = files["ppo-score.csv"]
    assert len(curve) == 100
    assert {"step", "sampled", "held-out prompts"} <= curve[0].keys()
    _Page(page)  # well-formed


def test_proxy_and_gold_are_drawn_over_the_root_of_kl(tmp_path: Path) -> None:
    """From the evaluation: the start at KL 0, PPO at 4.2 nats, where the proxy has risen and the gold scorer fallen."""
    page = make(tmp_path)
    rows = files_of(page)["ppo-proxy-and-gold-over-the-root-of-kl.csv"]
    assert [float(row["root of KL"]) for row in rows] == pytest.approx([0.0, 4.2**0.5])
    assert [float(row["reward model (proxy)"]) for row in rows] == [-0.5, 0.3]
    assert [float(row["gold scorer"]) for row in rows] == [0.1, -0.2]
    assert "over-optimised" in page


@pytest.mark.parametrize(("steps", "points"), [((25, 50, 75, 100), 4), ((100,), 2)], ids=["curve", "one"])
def test_every_evaluation_of_a_training_is_a_point_of_proxy_and_gold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], points: int
) -> None:
    """A history with one evaluation says less than start and end, which `evaluate` measured."""

    def own(stage: Stage, step: int) -> dict[str, float]:
        if stage is not Stage.PPO or step not in steps:
            return {}
        return {"eval/kl": (step / 25) ** 2, "eval/score": step / 50, "eval/gold_score": 0.3 - step / 500}

    monkeypatch.setattr("tests.pipeline_records._own_metrics", own)
    rows = files_of(make(tmp_path))["ppo-proxy-and-gold-over-the-root-of-kl.csv"]
    assert len(rows) == points
    if points == 4:
        assert [float(row["root of KL"]) for row in rows] == [1.0, 2.0, 3.0, 4.0]
        assert [float(row["reward model (proxy)"]) for row in rows] == [0.5, 1.0, 1.5, 2.0]
        assert [float(row["gold scorer"]) for row in rows] == pytest.approx([0.25, 0.2, 0.15, 0.1])


def test_an_evaluation_of_an_earlier_release_has_none_of_it(tmp_path: Path) -> None:
    page = make(tmp_path, evaluation=EVALUATION, promotion=PROMOTION)
    for section in ("suites", "champion", "gates"):
        assert f'id="{section}"' not in page
    assert "Evaluation on held-out data" in page


def test_a_champion_that_could_not_be_measured_is_named_with_the_reason(tmp_path: Path) -> None:
    evaluation = {**JUDGED, "champion": {"name": "demo-aligned", "version": "7", "missing": "its weights are gone"}}
    assert "The champion was not measured: its weights are gone." in make(tmp_path, evaluation=evaluation)


def test_suites_that_are_no_suites_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.json cannot be read: suites"):
        make(tmp_path, evaluation={**JUDGED, "suites": {"x": {"roles": 3}}})


def test_names_of_suites_are_shown_and_never_interpreted(tmp_path: Path) -> None:
    name = '=HYPERLINK("x")</td><script>x()</script>'
    suites = {name: SUITES["suites"]["questions"]}
    page = make(tmp_path, evaluation={**JUDGED, "suites": suites, "comparisons": [compared("ppo", "sft", name, 1, 2)]})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    cells = [cell for rows in files_of(page).values() for row in rows for cell in row.values()]
    assert name not in cells
    assert f"'{name}" in cells  # a spreadsheet would run it otherwise


def test_samples_that_alignment_changed_most_come_first(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    story = read_story(refs_for(Stage.REPORT, made), run_info(), title="t", max_samples=2)
    answers = {"same": "one two three", "half": "one two four", "new": "five six seven"}
    samples = [
        {"prompt": prompt, "responses": {"sft": "one two three", "ppo": text, "dpo": "one two three"}}
        for prompt, text in answers.items()
    ]
    page = render_page(type(story)(**{**vars(story), "samples": samples}))
    shown = re.findall(r'<article class="sample"><h3>(\w+)</h3>', page)
    assert shown == ["new", "half"]
    assert "changed most" in page
    assert store is not None


def test_items_that_changed_most_are_shown_with_both_answers(tmp_path: Path) -> None:
    """Twenty items gain 0.00 to 0.19, one loses; the five largest gains, the five smallest differences and the loss."""
    before = [Score(f"item-{number}", 0.5, response=f"old {number}") for number in range(20)]
    after = [Score(f"item-{number}", 0.5 + number / 100, response="<b>new</b>") for number in range(20)]
    before.append(Score("lost", 1.0, response="right"))
    after.append(Score("lost", 0.0, response="wrong"))
    elsewhere = {("language", "sft"): [Score("a", 1.0)], ("language", "ppo"): [Score("a", 1.2)]}
    page = make(tmp_path, scores={("questions", "sft"): before, ("questions", "ppo"): after, **elsewhere})
    rows = rows_of(page, "Items of questions that changed most")
    assert rows[0] == ["item", "SFT", "PPO", "SFT said", "PPO said"]
    assert [row[0] for row in rows[1:6]] == [f"item-{number}" for number in (19, 18, 17, 16, 15)]
    assert rows[1][1:] == ["0.5", "0.69", "old 19", "&lt;b&gt;new&lt;/b&gt;"]
    assert rows[-1] == ["lost", "1", "0", "right", "wrong"]
    assert len(rows) == 11
    assert "item-0" not in [row[0] for row in rows]  # it did not change
    worse = next(row for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL) if "<code>a</code>" in row)
    assert "num worst" in worse  # more bits


@pytest.mark.parametrize("name", ["scores.parquet", "responses.parquet"])
def test_scores_that_are_none_are_refused_by_name(tmp_path: Path, name: str) -> None:
    scores = {("questions", role): [Score("a", value)] for role, value in (("sft", 0.0), ("ppo", 1.0))}
    with pytest.raises(DataError, match=name):
        make(tmp_path, scores=scores, damaged=name)


def test_a_figure_of_many_points_shows_some_and_links_the_rest() -> None:
    found = figure_data("x", ("step", "loss"), [(float(step), 1 / (step + 1)) for step in range(12_345)])
    assert found is not None
    assert found.num_rows == 12_345
    assert (found.rows[0][0], found.rows[-1][0]) == ("0", "12,344")
    assert len(found.rows) == 20
    linked = base64.b64decode(found.csv.removeprefix(CSV)).decode().splitlines()
    assert len(linked) == 5_001
    assert linked[-1].startswith("12344,")
    assert "The file has 5,000 of them" in found.note


def test_a_step_that_was_not_finite_is_in_the_numbers_of_its_figure() -> None:
    """Training skips such a step, and logs it."""
    rows = [(1.0, 2.5), (2.0, math.nan), (3.0, math.inf), (4.0, -math.inf), (5.0, None)]
    found = figure_data("x", ("step", "loss"), rows)
    assert found is not None
    assert [row[1] for row in found.rows] == ["2.5", "–", "–", "–", "–"]
    linked = base64.b64decode(found.csv.removeprefix(CSV)).decode().splitlines()
    assert linked == ["step,loss", "1,2.5", "2,nan", "3,inf", "4,-inf", "5,"]


def test_intervals_are_drawn_where_they_are_and_never_outside(tmp_path: Path) -> None:
    svg = interval_plot([Estimate("a", 0.5, 0.4, 0.6), Estimate("b" * 99, 0.55)], label="x", mark=0.45)
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    low, high = (float(x) for x in re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)M', svg)[0])
    assert low < dots[0] < dots[1] < high < 380
    assert dots[0] - low == pytest.approx(high - dots[0], abs=0.2)
    assert "…" in svg
    assert interval_plot([Estimate("a", float("nan"))], label="x") == ""
