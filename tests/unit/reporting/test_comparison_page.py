"""The page of a comparison: what it says, in numbers that can be redone by hand, and what it never lets through."""

import re

from stages.config.compare_results import Comparison, best_settings, settings_of
from stages.config.request import RunInfo
from stages.reporting.comparison_page import render_comparison
from stages.reporting.comparison_tables import failures_table, memory_table, models_table, settings_table, versus_table
from stages.reporting.comparison_views import cautions, criteria_table, figures, reason, verdict
from stages.reporting.scatter_plot import Cloud, Point, scatter_plot
from tests.compared import combination, comparison, estimate, model

RUN = RunInfo(run_id="r", name="comparison", airflow_run_id="manual__1", airflow_url="http://airflow/dags/x")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e"


def criteria(found: Comparison) -> dict[str, list[tuple[str, str]]]:
    table = criteria_table(found, best_settings(settings_of(found)))
    return {row[0].text: [(cell.text, cell.detail) for cell in row[1:]] for row in table.rows}


def test_each_criterion_has_its_measured_number_at_the_best_beta() -> None:
    table = criteria_table(comparison(), best_settings(settings_of(comparison())))
    assert table.head == ("criterion", "dpo, beta 0.1", "ppo, beta 0.1")  # gains 0.5 against 0.25, 0.2 against -0.4
    found = criteria(comparison())
    assert list(found) == ["complexity", "stability", "memory", "speed", "performance", "reward hacking"]
    assert found["complexity"][1] == ("2 trained, 2 frozen", "40 settings, 0 of them not as the recipe says")
    # 0.4 and 0.6 have a sample deviation of 0.2 / sqrt(2).
    assert found["stability"][0] == ("± 0.14 over 2 seeds", "gain by gold from +0.4 to +0.6")
    assert found["memory"][0][0] == "6.0 MiB of models"  # (1 + 2) / 2 MiB, four times
    assert found["speed"][0] == ("1 min 30 s", "2 min 30 s of CPU")
    assert found["speed"][1] == ("5 min 30 s", "9 min 10 s of CPU, 3.67 times the fastest")
    assert found["performance"][0] == ("+0.5 by gold", "above zero for sure in 2 of 2 models, wins 62.5% by gold")
    assert found["reward hacking"][1] == ("gap +1.6 SD", "proxy +2 SD, gold +0.4 SD")


def test_a_proxy_that_rises_while_gold_falls_is_called_hacking_and_only_then() -> None:
    assert any(
        "Reward hacking" in said and "ppo, beta 0.01, seed 0" in said
        for said in cautions(comparison(), settings_of(comparison()))
    )
    unsure = model(0, combination("ppo"), gold=-0.05, proxy=2.0, kl=1.0)
    found = comparison(models=(unsure,))
    assert not any("Reward hacking" in said for said in cautions(found, settings_of(found)))


def test_the_verdict_names_the_best_and_says_whether_the_prompts_settle_it() -> None:
    best = best_settings(settings_of(comparison()))
    assert verdict(best) == "dpo, beta 0.1 gains most by the gold scorer: +0.5, before ppo, beta 0.1 with +0.2."
    sure = "Over all betas and seeds dpo wins 58.0% of the prompts against ppo (54.0% to 62.0%), "
    assert reason(comparison(), best) == f"{sure}which is sure on these prompts."
    versus = comparison().versus[0]
    open_race = comparison(versus=(versus.model_copy(update={"win_rate": estimate(0.52, 0.04)}),))
    assert "these prompts do not settle" in reason(open_race, best)
    turned = versus.model_copy(update={"method": "ppo", "against": "dpo", "win_rate": estimate(0.42, 0.04)})
    assert reason(comparison(versus=(turned,)), best) == reason(comparison(), best)
    lost = versus.model_copy(update={"win_rate": estimate(0.42, 0.04)})
    assert "the other way round" in reason(comparison(versus=(lost,)), best)


def test_a_failed_combination_stands_there_with_its_reason_and_nothing_else_is_lost() -> None:
    failures = failures_table(comparison())
    assert failures is not None
    ((name, why),) = [[cell.text for cell in row] for row in failures.rows]
    assert name == "ppo, beta 0.01, seed 1"
    assert "5 steps in a row" in why
    assert len(models_table(comparison()).rows) == 8
    rows = {
        row[0].text: [cell.text for cell in row]
        for row in settings_table(settings_of(comparison()), with_judge=False).rows
    }
    assert rows["ppo, beta 0.01"][1:4] == ["2", "1", "-0.4"]  # of one seed there is no deviation
    assert "1 of 8 combinations failed" in cautions(comparison(), settings_of(comparison()))[0]


def test_numbers_over_seeds_are_means_with_their_deviation_and_range() -> None:
    table = settings_table(settings_of(comparison()), with_judge=False)
    row = dict(zip(table.head, [cell.text for cell in table.rows[0]], strict=True))
    assert row["gain by gold"] == "+0.5 ± 0.14"
    assert row["range over seeds"] == "+0.4 to +0.6"
    assert (row["wins by gold"], row["KL"], row["wall time"]) == ("62.5%", "2.25", "1 min 30 s")


def test_weak_judges_and_few_seeds_are_said_before_the_numbers() -> None:
    found = comparison(gold_agreement=estimate(0.52, 0.05), judge="big", judge_is_proven=False)
    said = " ".join(cautions(found, settings_of(found)))
    assert "not surely better than chance" in said
    assert "The judge has not shown" in said
    assert "only 1 seed " in said


def test_the_judge_has_columns_only_where_there_is_one() -> None:
    assert "wins by the judge" not in models_table(comparison()).head
    judged = comparison(judge="big")
    assert "wins by the judge" in models_table(judged).head
    assert all(len(row) == len(models_table(judged).head) for row in models_table(judged).rows)


def test_the_frontier_draws_every_model_and_joins_the_means_of_a_method() -> None:
    gold, proxy, gains = figures(comparison(), settings_of(comparison()))
    assert gold.svg.count("<circle") == proxy.svg.count("<circle") == 7
    assert gold.svg.count('class="line faint"') == 2
    assert gold.legend == (("dpo", 1), ("ppo", 2))
    assert gold.data is not None
    assert gold.data.num_rows == 7
    assert gains.svg.count("<circle") == 7


def test_what_cannot_be_drawn_is_left_out_and_many_methods_stay_apart() -> None:
    nothing = Cloud("a", (Point("x", float("nan"), 1.0), Point("y", 1.0, float("inf"))))
    assert scatter_plot([nothing], label="l", x_label="x") == ""
    many = [Cloud(str(place), (Point("p", place, place),)) for place in range(6)]
    svg = scatter_plot(many, label="l", x_label="x")
    assert (svg.count("<circle"), svg.count("<rect")) == (4, 2)


def test_every_row_of_every_table_is_as_long_as_its_head() -> None:
    found = comparison()
    tables = [
        models_table(found),
        versus_table(found),
        memory_table(found),
        settings_table(settings_of(found), with_judge=True),
    ]
    for table in tables:
        assert table is not None
        assert {len(row) for row in table.rows} == {len(table.head)}


def test_hostile_names_and_reasons_stay_text() -> None:
    found = comparison(first=HOSTILE, title=HOSTILE, judge=HOSTILE)
    failed = found.models[-1].model_copy(update={"failure": HOSTILE})
    page = render_comparison(found.model_copy(update={"models": (*found.models[:-1], failed)}), RUN)
    assert not re.search(r"<(script|img)", page)
    assert "\u202e" not in page
    assert "&lt;script&gt;" in page
    hostile_run = RUN.model_copy(update={"airflow_url": "javascript:alert(1)"})
    assert "javascript:" not in render_comparison(comparison(), hostile_run)


def test_a_comparison_without_any_result_is_still_a_page() -> None:
    failed = tuple(
        one.model_copy(update={"failure": "gone", "gold_gain": None, "gold": None, "memory": None})
        for one in comparison().models
    )
    page = render_comparison(comparison(models=failed, versus=(), gold_agreement=None), RUN)
    assert "No model of this comparison has a result by the gold scorer." in page
    assert 'class="plot"' not in page
