"""What was made of the prompts, counted: for each step, in = kept + dropped by reason, and the same by principle."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from stages.data.constitution.acceptance import ACCEPTED, words
from stages.data.constitution.work import FIRST, REVISED, SECOND, Worked


def ledger(worked: Sequence[Worked], prompts: dict[str, Any], pairs: dict[str, int]) -> dict[str, Any]:
    """Return the account; raises AssertionError when it does not conserve."""
    rounds = [one for each in worked for one in each.rounds]
    compared = [each.comparison for each in worked if each.comparison is not None]
    responses = _counted((each.outcome for each in worked), kept={REVISED})
    if prompts["kept"] != responses["in"]:
        raise AssertionError(f"{prompts['kept']} prompts were kept and {responses['in']} have a record")
    return {
        "prompts": prompts,
        "responses": responses,
        "rounds": _counted((one.outcome for one in rounds), kept={ACCEPTED}),
        "comparisons": _counted((one.outcome for one in compared), kept={FIRST, SECOND}),
        "principles": {
            "rounds": _by((one.principle, one.outcome) for one in rounds),
            "comparisons": _by((one.principle, one.outcome) for one in compared),
        },
        "areas": {
            "rounds": _by((one.area, one.outcome) for one in rounds),
            "comparisons": _by((one.area, one.outcome) for one in compared),
        },
        "published": pairs,
    }


def metrics(worked: Sequence[Worked], account: dict[str, Any]) -> dict[str, float]:
    """Shares and counts; a share of nothing is left out."""
    compared = [each.comparison for each in worked if each.comparison is not None]
    asked = sum(one.asked for one in compared)
    revised = [each for each in worked if each.revision]
    lengths = [(len(words(each.revision)), len(words(each.response))) for each in revised]
    found = {
        "constitution/prompts": float(account["prompts"]["kept"]),
        "constitution/revised": float(len(revised)),
        "constitution/pairs": float(sum(account["published"].get(name, 0) for name in ("revision", "labelled"))),
        **_share("constitution/accepted_share", account["rounds"]),
        **_share("constitution/agreed_share", account["comparisons"]),
        **{
            key: value
            for area, one in account["areas"]["rounds"].items()
            for key, value in _share(f"constitution/{area}/accepted_share", one).items()
        },
        **{
            key: value
            for name, one in account["principles"]["rounds"].items()
            for key, value in _share(f"constitution/principle/{name}/accepted_share", one).items()
        },
    }
    if lengths:
        found["constitution/length_ratio"] = sum(new for new, _ in lengths) / sum(old for _, old in lengths)
    if asked:
        found["constitution/first_place_share"] = sum(one.placed_first for one in compared) / asked
    return found


def _counted(outcomes: Iterable[str], *, kept: set[str]) -> dict[str, Any]:
    counts = Counter(outcomes)
    dropped = {reason: number for reason, number in sorted(counts.items()) if reason not in kept}
    return {"in": counts.total(), "kept": sum(counts[name] for name in kept), "dropped": dropped}


def _by(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, outcome in pairs:
        groups[name].append(outcome)
    return {name: _counted(groups[name], kept={ACCEPTED, FIRST, SECOND}) for name in sorted(groups)}


def _share(name: str, counted: dict[str, Any]) -> dict[str, float]:
    return {name: counted["kept"] / counted["in"]} if counted["in"] else {}
