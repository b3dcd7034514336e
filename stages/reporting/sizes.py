"""How large a model is and on how much text it was made, and what to expect of one that is small in both."""

from collections.abc import Iterable
from dataclasses import dataclass

from stages.artifacts.manifests import read_manifest
from stages.config.graph import Stage
from stages.config.request import Manifest, SourceKind
from stages.config.text import compact
from stages.lineage.graph import ancestors
from stages.lineage.tags import is_model

FEWEST_PARAMETERS, FEWEST_TOKENS = 50e6, 500e6
"""Below either, a model of general text writes no sentences that hold: published models that do have 70 million
parameters (Pythia, SmolLM) to 125 million (GPT-2, OPT), and were trained on billions of tokens."""


@dataclass(frozen=True)
class ModelSize:
    """What the manifests of a model and of what it was made from say."""

    parameters: int
    pretrained_tokens: int | None
    """In all pretraining that led to it; None when some of it happened elsewhere, on nobody knows how much."""

    @property
    def is_too_small_for_sentences(self) -> bool:
        few_tokens = self.pretrained_tokens is not None and self.pretrained_tokens < FEWEST_TOKENS
        return bool(self.parameters) and (self.parameters < FEWEST_PARAMETERS or few_tokens)

    def note(self) -> str:
        """A sentence to stand beside what such a model says; empty for a model that may be taken at its word."""
        if not self.is_too_small_for_sentences:
            return ""
        tokens = "" if self.pretrained_tokens is None else f" trained on {compact(self.pretrained_tokens)} tokens"
        return (
            f"A model of {compact(self.parameters)} parameters{tokens} cannot write sentences that are right. "
            "Judge it by the numbers on held-out data, not by what its answers say."
        )


def size_of(model: Manifest, made_from: Iterable[Manifest]) -> ModelSize:
    """The size of a model; `made_from` holds its ancestors, itself included or not."""
    family = {manifest.fingerprint: manifest for manifest in (*made_from, model)}.values()
    pretrained = [manifest for manifest in family if manifest.stage is Stage.PRETRAIN]
    given = any(source.kind is SourceKind.MODEL for manifest in family for source in manifest.sources)
    trained = [manifest.ledger.get("tokens_trained") for manifest in pretrained]
    known = [number for number in trained if isinstance(number, int | float)]
    complete = not given and pretrained and len(known) == len(pretrained)
    return ModelSize(stored_parameters(model), int(sum(known)) if complete else None)


def size_at(uri: str) -> ModelSize:
    """The size of the model at an artifact's address, whose ancestors are read too; raises StageError when one of them
    cannot be."""
    model = read_manifest(uri)
    before = (node for node in ancestors([uri]).nodes if is_model(node.kind))
    return size_of(model, [read_manifest(node.uri) for node in before])


def stored_parameters(manifest: Manifest) -> int:
    """Weights are stored in float32; those of an adapter, which lies in a folder of its own, are merged into them."""
    files = (entry for entry in manifest.files if entry.path.endswith(".safetensors") and "/" not in entry.path)
    return sum(entry.size for entry in files) // 4
