"""What the scrubber finds of personal data planted into real text, by type, and that it touches nothing else there."""

import gzip
import json
import random
import re
import tarfile
from collections import Counter

import pytest

from stages.data.curation.pii import scrub
from tests.places import SHARED
from tests.planted_pii import MAKERS, Sample

PEPS = SHARED / "data" / "corpus" / "peps.tar.gz"
CODE = SHARED / "data" / "sft" / "gpteacher_codegen.json.gz"
needs_data = pytest.mark.skipif(not PEPS.exists(), reason="real text is missing: shared/data beside the repository")
_ADDRESS = re.compile(r"[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}")
_VERSION = re.compile(r"(?<![\w.])v?\d+(?:\.\d+)+(?:(?:a|b|rc|\.post|\.dev)\d+)?(?![\w.])")


@pytest.fixture(scope="module")
def peps() -> dict[str, str]:
    with tarfile.open(PEPS) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {name: file.read().decode() for name, file in files.items() if file}


def _samples(count: int) -> list[Sample]:
    return [make(random.Random(f"{make.__name__}/{number}")) for make in MAKERS for number in range(count)]


@needs_data
def test_of_each_type_95_percent_are_found_in_real_text_and_95_percent_of_what_is_found_is_right() -> None:
    """Each value stands in a line of its own between lines of real code, in which nothing is replaced without it."""
    rows = json.loads(gzip.decompress(CODE.read_bytes()))
    lines = [line for row in rows[:400] for line in row["response"].splitlines() if scrub(line).text == line]
    planted, right, found = Counter[str](), Counter[str](), Counter[str]()
    for number, sample in enumerate(_samples(60)):
        before, after = lines[number % (len(lines) - 8) :][:4], lines[number % (len(lines) - 8) + 4 :][:4]
        result = scrub("\n".join((*before, sample.line, *after)))
        planted[sample.kind] += 1
        found.update(result.counts)
        right[sample.kind] += (
            "\n".join((*before, sample.line.replace(sample.value, f"<{sample.kind}>"), *after)) == result.text
        )
    for kind, count in planted.items():
        assert right[kind] / count >= 0.95, (kind, right[kind], count)
        assert right[kind] / max(1, found[kind]) >= 0.95, (kind, right[kind], found[kind])


@needs_data
def test_no_address_of_the_peps_stays_and_no_version_is_touched(peps: dict[str, str]) -> None:
    left, lost = list[str](), list[str]()
    for name, text in peps.items():
        clean = scrub(text).text
        # Services and made-up places in code are no addresses: git@github.com:owner/name, @module.decorator.
        left += [
            f"{name}: {found}" for found in _ADDRESS.findall(clean) if not found.startswith(("git@", "hg@", "ssh@"))
        ]
        kept = Counter(_VERSION.findall(clean))
        # Addresses of machines in the PEP about the module ipaddress have the form of versions.
        lost += [f"{name}: {version}" for version in (Counter(_VERSION.findall(text)) - kept) if "3144" not in name]
    assert left == []
    assert lost == []
