"""Documents with a known fault, planted among the real ones to measure what the filters find; none is ever published.

All are made here from a seed. The personal data are well-formed but invented, the toxic sentences are insults
of the kind the classifier was made for, foreign text is Airflow's own translation of its user interface where Airflow
is installed, and near duplicates are real documents with a few words changed.
"""

import json
import random
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.data.curation.pii_numbers import luhn_valid
from stages.data.sources.records import SourceDocument

SOURCE = "planted"
NEAR_DUPLICATE, TOXIC, FOREIGN, PII = "near_duplicate", "toxic", "foreign", "pii_"
_CHANGED_WORDS = 0.02

_PROSE = (
    "The service writes one record for every request that it has answered, and the records are kept for thirty days.",
    "When the number of open connections grows beyond the limit, new requests have to wait until one is closed.",
    "This page describes how the scheduler decides which of the tasks that are ready is going to be started first.",
    "Each worker reads its settings from a file at the start and does not look at the file again while it runs.",
    "If the upload is interrupted, the client can continue from the last part that the server has acknowledged.",
    "The report that is sent at the end of the week compares the figures with those of the month before.",
    "An administrator may change the order of the queues, but a job that has been started is never taken back.",
    "The values in the second column have been rounded, so that their sum may differ from the total by a little.",
    "Backups are made every night and are tested once a month by restoring one of them to a machine of its own.",
    "To find out why a job has failed, look at the last lines of its log and at the state of the disk it ran on.",
)
_INSULTS = (
    "You are a stupid worthless idiot and everybody hates you, you pathetic piece of shit.",
    "Shut the fuck up, you disgusting moron, nobody wants to read your bullshit.",
    "Go to hell, you ugly bastard, and take your damn lies with you.",
    "What a dumb bitch, she should crawl back into the filthy hole that she came from.",
    "These lazy assholes are nothing but scum, and I hope that every one of them rots.",
)
_CONTEXT: dict[str, str] = {
    "EMAIL": "If you have any question about the bill, please write to {value} and name the number of the order.",
    "IPV4": "The last login to this account came from the address {value} and used a browser that we did not know.",
    "IPV6": "The last login to this account came from the address {value} and used a browser that we did not know.",
    "PHONE": "If nobody opens the door, please call {value} and ask for the person who is on duty that evening.",
    "CREDIT_CARD": "The guest has paid with card {value} and wants to have the receipt sent to the usual place.",
    "IBAN": "Please transfer the amount to the account {value} and give the number of the invoice in the subject line.",
    "LOGIN": "The job reads its rows from {value} and stops with an error if the server does not answer in time.",
    "SECRET": "The settings of the old service still say {value} and nobody has changed that since the first release.",
    "PRIVATE_KEY": "Somebody pasted the key of the server into the ticket, {value} and it had to be replaced.",
    "SSN": "The applicant has given the social security number {value} and signed the form at the bottom of the page.",
}


@dataclass(frozen=True, slots=True)
class Planted:
    """A planted document and, for personal data, the value that must be gone from it afterwards."""

    document: SourceDocument
    secret: str = ""


def plant(count: int, seed: int, originals: Sequence[SourceDocument]) -> list[Planted]:
    """`count` documents of each kind; kinds without material (no Airflow, no originals) are left out."""
    made: list[Planted] = []
    for kind in sorted(_SECRETS):
        for index in range(count):
            rng = random.Random(f"{seed}/{kind}/{index}")
            secret = _SECRETS[kind](rng)
            lines = [*rng.sample(_PROSE, 4), _CONTEXT[kind].format(value=secret)]
            rng.shuffle(lines)
            made.append(Planted(_document(PII + kind.lower(), index, " ".join(lines), rng), secret))
    for index in range(count):
        rng = random.Random(f"{seed}/{TOXIC}/{index}")
        lines = [*rng.sample(_PROSE, 3), *rng.sample(_INSULTS, 3)]
        made.append(Planted(_document(TOXIC, index, " ".join(rng.sample(lines, len(lines))), rng)))
    made += [Planted(_document(FOREIGN, index, text)) for index, text in enumerate(_translations(count, seed))]
    for index, original in enumerate(originals[:count]):
        rng = random.Random(f"{seed}/{NEAR_DUPLICATE}/{index}")
        made.append(Planted(_document(NEAR_DUPLICATE, index, _altered(original.text, rng))))
    return made


def _document(kind: str, index: int, text: str, rng: random.Random | None = None) -> SourceDocument:
    """A document of its own: the ticket line keeps documents that share sentences from being near duplicates."""
    if rng is not None:
        words = " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9))) for _ in range(40))
        text = f"{text}\n\nThe index of this page has the words {words} and the names of the places that they are in."
    identity = f"{SOURCE}/{kind}/{index}"
    return SourceDocument(identity, text, SOURCE, SOURCE, identity, planted=kind)


def _altered(text: str, rng: random.Random) -> str:
    """The text with about every fiftieth word, and at least one, replaced."""
    lines = text.split("\n")
    places = [
        (row, column) for row, line in enumerate(lines) for column, word in enumerate(line.split(" ")) if word.isalnum()
    ]
    for row, column in rng.sample(places, max(1, round(len(places) * _CHANGED_WORDS))):
        words = lines[row].split(" ")
        words[column] = rng.choice(("another", "value", "section", "example", "given"))
        lines[row] = " ".join(words)
    return "\n".join(lines)


def _translations(count: int, seed: int) -> list[str]:
    """Texts of Airflow's user interface in `count` languages other than English, some sentences each."""
    spec = find_spec("airflow")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    languages = sorted(
        path
        for folder in folders
        for path in folder.glob("ui/dist/i18n/locales/*")
        if path.name != "en" and path.is_dir()
    )
    chosen = random.Random(f"{seed}/{FOREIGN}").sample(languages, min(count, len(languages)))
    texts: list[str] = []
    for language in chosen:
        strings = [text for path in sorted(language.glob("*.json")) for text in _strings(json.loads(path.read_text()))]
        longest = sorted(set(strings), key=lambda text: (-len(text), text))[:12]
        texts.append("\n".join(text if text.endswith((".", "。")) else f"{text}." for text in longest))
    return texts


def _strings(tree: object) -> Iterable[str]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _strings(value)
    elif isinstance(tree, str) and "{{" not in tree:
        yield tree


def _email(rng: random.Random) -> str:
    names = ("anna", "bruno", "clara", "david", "elena", "felix", "greta", "henrik")
    return f"{rng.choice(names)}.{rng.choice(names)}{rng.randint(1, 99)}@mail{rng.randint(1, 99)}.example.com"


def _ipv4(rng: random.Random) -> str:
    return (
        f"{rng.choice((52, 63, 81, 93, 151, 188))}.{rng.randint(40, 250)}.{rng.randint(1, 254)}.{rng.randint(1, 254)}"
    )


def _ipv6(rng: random.Random) -> str:
    return "2a00:" + ":".join(f"{rng.randint(4096, 65535):x}" for _ in range(7))


def _phone(rng: random.Random) -> str:
    last = f"{rng.randint(0, 9999):04d}"
    return rng.choice((f"+1 650-253-{last}", f"(212) 736-{last}", f"+49 30 2259{last}", f"+44 20 7946 {last}"))


def _credit_card(rng: random.Random) -> str:
    digits = "4" + "".join(str(rng.randint(0, 9)) for _ in range(14))
    digits += next(digit for digit in string.digits if luhn_valid(digits + digit))
    return " ".join(digits[start : start + 4] for start in range(0, 16, 4))


def _iban(rng: random.Random) -> str:
    account = "".join(str(rng.randint(0, 9)) for _ in range(18))
    check = 98 - int(f"{account}{int('D', 36)}{int('E', 36)}00") % 97
    return f"DE{check:02d}{account}"


def _ssn(rng: random.Random) -> str:
    return f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"


def _login(rng: random.Random) -> str:
    return (
        f"https://{rng.choice(('anna', 'bruno', 'clara'))}:{_random(rng, 14)}@rows{rng.randint(1, 99)}.example.com/data"
    )


def _secret(rng: random.Random) -> str:
    name = rng.choice(("password", "api_key", "auth_token"))
    return rng.choice((f'{name} = "{_random(rng, 20)}"', f"ghp_{_random(rng, 36)}", f"AKIA{_random(rng, 16).upper()}"))


def _private_key(rng: random.Random) -> str:
    lines = "\n".join(_random(rng, 64) for _ in range(3))
    return f"-----BEGIN PRIVATE KEY-----\n{lines}\n-----END PRIVATE KEY-----"


def _random(rng: random.Random, length: int) -> str:
    """Letters and digits, both in it."""
    return "Qz7" + "".join(rng.choices(string.ascii_letters + string.digits, k=length - 3))


_SECRETS: dict[str, Callable[[random.Random], str]] = {
    "EMAIL": _email,
    "IPV4": _ipv4,
    "IPV6": _ipv6,
    "PHONE": _phone,
    "CREDIT_CARD": _credit_card,
    "IBAN": _iban,
    "SSN": _ssn,
    "LOGIN": _login,
    "SECRET": _secret,
    "PRIVATE_KEY": _private_key,
}

# Where a planted document of a kind must be dropped; a PII one must instead come out without its secret.
_EXPECTED = {TOXIC: "toxicity", FOREIGN: "language", NEAR_DUPLICATE: "near_duplicates"}


def score(
    planted: Sequence[Planted], dropped: Mapping[str, str], survivors: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """For each kind how many were found, dropped by another step, or missed.

    `dropped` says by id which `step/reason` took a document, `survivors` is the final text of the others.
    """
    outcomes: dict[str, Counter[str]] = {}
    where: dict[str, Counter[str]] = {}
    for entry in planted:
        kind, identity = entry.document.planted, entry.document.id
        took = dropped.get(identity)
        if took is None:
            clean = bool(entry.secret) and entry.secret not in survivors[identity]
            outcome = "found" if clean else "missed"
        else:
            outcome = "found" if took.split("/")[0] == _EXPECTED.get(kind) else "dropped_elsewhere"
            where.setdefault(kind, Counter())[took] += 1
        outcomes.setdefault(kind, Counter())[outcome] += 1
    return {
        kind: {
            "planted": counts.total(),
            **{outcome: counts[outcome] for outcome in ("found", "missed", "dropped_elsewhere")},
            "dropped_by": dict(sorted(where.get(kind, Counter()).items())),
        }
        for kind, counts in sorted(outcomes.items())
    }
