"""From raw sources to curated text: read, filter, deduplicate, scrub, hold out, derive pairs, account for every loss.

`acts` is the story in order. Texts stay in files, which processes of one pool read and write by unit or by shard.
"""

from collections.abc import Callable, Iterator

from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import PREVIOUS
from stages.data.curation import account, acts
from stages.data.curation.findings import Curation
from stages.data.curation.pool import num_processes, process_pool
from stages.data.curation.workbench import Workbench
from stages.data.pairs.build import build_pairs
from stages.data.sources import readers
from stages.data.sources.streams import MAX_RECORD_BYTES, Damaged, read_whole
from stages.job.context import StageContext, StageOutcome

Act = Callable[[Curation], None]


def run(context: StageContext) -> StageOutcome:
    """Write documents/, instructions/, preferences/, perhaps unpaired/, index/, ledger.json and planted.json.

    With an input `previous`, documents are those that it and its predecessors have not seen; its held-out documents and
    all of its pairs are taken over.
    """
    config = context.config
    assert isinstance(config, CurateConfig)
    previous = context.input_dir(PREVIOUS) if PREVIOUS in context.inputs else None
    made = {role: context.input_dir(role) for role, _ in GRAPH[Stage.CURATE].inputs if role in context.inputs}
    bench = Workbench(config, context.work_dir, context.output_dir, previous, _word_list(config), made)
    with process_pool(num_processes(context.execution)) as pool:
        curation = Curation(bench, pool, context.progress)
        for act in acts_of(config):
            act(curation)
        return _conclude(curation, previous=context.inputs[PREVIOUS].fingerprint if previous else "")


def acts_of(config: CurateConfig) -> Iterator[Act]:
    """All that is done with the documents, in order; the pairs are made at the same time."""
    if not config.documents:
        yield acts.go_without
        yield start_pairs
        yield acts.carry
        return
    yield acts.recall
    yield acts.read
    yield acts.mark
    yield start_pairs
    if config.planted:
        yield acts.plant
    yield acts.filter_documents
    if config.near_duplicates:
        yield acts.match_near_copies
    yield acts.finish
    yield acts.verify
    yield acts.carry


def start_pairs(curation: Curation) -> None:
    """Make instruction and preference pairs of the symbols that were read, or of the given rows."""
    curation.pairs = curation.pool.submit(build_pairs, len(curation.units), curation.bench)


def _conclude(curation: Curation, *, previous: str) -> StageOutcome:
    pairs, found = curation.pairs_account(), account.planted_score(curation)
    ledger = account.ledger(curation, pairs, found, previous=previous)
    curation.bench.publish_json("ledger.json", ledger, indent=1)
    curation.bench.publish_json("planted.json", found, indent=1)
    return StageOutcome(metrics=account.metrics(curation, pairs, found), ledger=ledger)


def _word_list(config: CurateConfig) -> tuple[str, ...]:
    if config.toxicity != "word-list":
        return ()
    files = readers.data_files(config.toxicity_word_list, ("",)).files
    try:
        return tuple(read_whole(files[0], MAX_RECORD_BYTES).decode("utf-8-sig", "replace").splitlines())
    except Damaged as error:
        raise DataError(
            f"toxicity_word_list={config.toxicity_word_list!r} cannot be read ({error.reason}): {error}",
            advice="Repair it: a text file with one word or phrase a line, also with .gz or .zst.",
        ) from None
