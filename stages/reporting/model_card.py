"""A model card in Hugging Face's format: a header for the hub, then where the model came from and what it is worth.

All of it is copied from manifests. Cards are read by strangers, so addresses inside the deployment (folders, buckets)
are left out: a source is named by its last part and its digest, data sets and models of the hub in full.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stages.config.errors import without_logins
from stages.config.graph import Stage, spec_of_kind
from stages.config.markdown import code, plain, table
from stages.config.places import hub_name
from stages.config.request import Manifest, SourceEntry, SourceKind
from stages.config.text import compact
from stages.reporting import card_sections
from stages.reporting.evidence import Evidence
from stages.reporting.sizes import size_of, stored_parameters

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_ADDRESS = re.compile(r"[a-z0-9+]+://|[/~]|\.{1,2}/")
_WITHIN = re.compile(r"\b(?:s3|file)://[^\s'\"),;]+|(?<![\w./:<>{%-])/(?:[\w.@-]+/)+[\w.@-]+")
"""Addresses and absolute paths within a sentence; not the slashes of web addresses, fractions and templates."""
_DIGITS = 12


@dataclass(frozen=True)
class CardFacts:
    """What a card says that is not in the manifests."""

    title: str
    evidence: Evidence
    dtype: str = "float32"
    parameters: int = 0
    """0 = by the size of the weights."""
    licence: str = ""
    is_adapter: bool = False
    base: str = ""
    """Of an adapter: where its base model is found, as adapter_config.json says."""
    base_revision: str = ""
    gguf: str = ""
    """Name of the GGUF file in the folder."""
    is_public: bool = True
    """Read by strangers: addresses inside the deployment are left out."""

    @property
    def family(self) -> Sequence[Manifest]:
        return self.evidence.family

    @property
    def model(self) -> Manifest:
        return self.evidence.model


def model_card(facts: CardFacts) -> str:
    """Return README.md: the header in YAML, then Markdown."""
    parts = [
        f"# {plain(facts.title)}",
        _summary(facts),
        "## Use it",
        _use(facts),
        "## What it is for",
        _intended(facts),
        "## Where it came from",
        _lineage(facts),
        "## Gates that it passed",
        card_sections.gates(facts.evidence, _hidden(facts)),
        "## Measured on held-out data",
        card_sections.measured(facts.evidence),
        *_decided(facts),
        "## Make it again",
        card_sections.reproduce(facts.evidence, _hidden(facts), is_public=facts.is_public),
        "## Limits",
        _limits(facts),
    ]
    return f"---\n{_header(facts)}---\n\n" + "\n\n".join(parts) + "\n"


def card_summary(facts: CardFacts, *, whole: str, at_most: int) -> str:
    """The card in short, for places with little room; `whole` says where all of it is."""
    numbers = card_sections.measured(facts.evidence)
    parts = [
        _summary(facts),
        *_decided(facts),
        "## Gates that it passed",
        card_sections.gates(facts.evidence, _hidden(facts)),
        "## Measured on held-out data",
        numbers,
        f"The whole card: {plain(whole)}",
    ]
    while len("\n\n".join(parts)) > at_most and len(parts) > 2:
        del parts[-2]  # whole sections, for half a table reads as the whole
    return "\n\n".join(parts)[:at_most]


def _decided(facts: CardFacts) -> list[str]:
    text = card_sections.decision(facts.evidence, _hidden(facts))
    return ["## Champion or not", text] if text else []


def _hidden(facts: CardFacts) -> card_sections.Hidden:
    return _without_addresses if facts.is_public else lambda value: value


def _intended(facts: CardFacts) -> str:
    if _scores(facts.model):
        return (
            "It orders answers to the same prompt, to train or to choose among them. It does not measure how good a "
            "model is that was trained against it, and it is no filter for what people are shown."
        )
    if facts.model.stage is Stage.PRETRAIN:
        return "A start for further training, and for measuring text. It is not meant to talk with people."
    return (
        "Answers in the languages and the subjects of its data, to people who can check them. It is not meant to "
        "decide about people, or where a wrong answer does harm."
    )


def _header(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    scores = _scores(facts.model)
    bases = [facts.base] if facts.is_adapter and _is_hub_id(facts.base) else _hub_models(facts.family)
    results = _results(facts)
    data = ModelCardData(
        eval_results=results or None,
        model_name=facts.title if results else None,
        license=facts.licence or "unknown",
        base_model=bases or None,
        base_model_relation=None if not bases else "adapter" if facts.is_adapter else "finetune",
        datasets=_hub_datasets(facts.family) or None,
        tags=["athanor", *(stage.value for stage in _trained(facts.family)), *(["lora"] if _lora(facts.model) else [])],
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
    )
    return f"{data.to_yaml()}\n"


def _results(facts: CardFacts) -> "list[EvalResult]":
    """What the hub shows next to a model; values only, the intervals are in the text."""
    from huggingface_hub import EvalResult

    role, suites = facts.evidence.role, facts.evidence.judged.suites
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=suite.metric or "value",
            metric_value=round(value, 6),
        )
        for name, suite in suites.items()
        if role in suite.roles and (value := suite.roles[role].value) is not None
    ]


def _summary(facts: CardFacts) -> str:
    spec = spec_of_kind(facts.model.kind)
    label = spec.label if spec else facts.model.kind
    what = (
        f"The LoRA adapter of {_article(label).lower()} {label} model"
        if facts.is_adapter
        else f"{_article(label)} {label} model"
    )
    start = f" It belongs on {code(facts.base)}{_at(facts.base_revision)}." if facts.is_adapter else ""
    note = _size_note(facts)
    parameters = facts.parameters or stored_parameters(facts.model)
    return f"{what}, made by Athanor: {compact(parameters)} parameters in {facts.dtype}.{start}" + (
        f"\n\n> {note}" if note else ""
    )


def _article(label: str) -> str:
    """Of a stage's label, some of which are read letter by letter."""
    return "An" if label.startswith("SFT") else "A"


def _size_note(facts: CardFacts) -> str:
    """By the whole model's parameters, also for an adapter; what the manifests say includes the files' headers."""
    size = size_of(facts.model, facts.family)
    known = facts.parameters and not facts.is_adapter
    return (replace(size, parameters=facts.parameters) if known else size).note()


def _at(revision: str) -> str:
    return f" at revision {code(revision)}" if revision else ""


def _use(facts: CardFacts) -> str:
    scores = _scores(facts.model)
    auto = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    options = ", num_labels=1" if scores and facts.is_adapter else ""
    if facts.is_adapter:
        revision = f", revision={facts.base_revision!r}" if facts.base_revision else ""
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f"base = {auto}.from_pretrained({facts.base!r}{revision}{options})",
            'model = PeftModel.from_pretrained(base, "this folder or repository")',
            'tokenizer = AutoTokenizer.from_pretrained("this folder or repository")',
        ]
    elif scores:
        lines = [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("this folder or repository")',
            'tokenizer = AutoTokenizer.from_pretrained("this folder or repository")',
            "# messages end with the assistant's turn; a higher score is a better answer",
            "ids = tokenizer.apply_chat_template(messages, return_tensors='pt', return_dict=True)",
            "score = model(**ids).logits[0, 0].item()",
        ]
    else:
        lines = [
            "from transformers import pipeline",
            "",
            'chat = pipeline("text-generation", "this folder or repository")',
            'messages = [{"role": "user", "content": "What does sorted do?"}]',
            'print(chat(messages, max_new_tokens=64)[0]["generated_text"][-1]["content"])',
        ]
    text = "```python\n" + "\n".join(lines) + "\n```"
    if facts.gguf:
        text += f"\n\n{code(facts.gguf)} is the same model for llama.cpp: `llama-cli -m {facts.gguf}`."
    return text


def _lineage(facts: CardFacts) -> str:
    rows = [
        (
            plain(manifest.stage.value),
            code(manifest.digest[:_DIGITS]),
            code(manifest.fingerprint[:_DIGITS]),
            ", ".join(f"{plain(entry.role)} {code(entry.digest[:_DIGITS])}" for entry in manifest.inputs) or "",
            plain(manifest.created_at[:10]),
        )
        for manifest in facts.family
    ]
    parts = [table(("stage", "content (sha256)", "fingerprint", "made from", "on"), rows)]
    if sources := _sources(facts.family):
        outside = [
            (
                plain(source.role),
                plain(_public(source) if facts.is_public else without_logins(source.uri)),
                code(source.digest.removeprefix("sha256:")[:_DIGITS]),
                plain(facts.evidence.licences.get(source.uri, "not stated")),
            )
            for source in sources
        ]
        parts.append(table(("came from outside", "what", "digest", "licence"), outside))
    if facts.evidence.missing:
        parts.append(f"This is not all: {plain(facts.evidence.missing, at_most=500)}.")
    parts.append(
        "Digests are cut to twelve digits here. Those who have the store get all of it from "
        f"`python -m stages.lineage ancestors` of {code(f'{facts.model.kind}/{facts.model.fingerprint}')}."
    )
    return "\n\n".join(parts)


def _limits(facts: CardFacts) -> str:
    lines = []
    if note := _size_note(facts):
        lines.append(note)
    if _scores(facts.model):
        lines.append(
            "It orders answers to one prompt. Its scores have no zero and no unit, and say little about texts unlike "
            "the pairs that it was trained on."
        )
    elif facts.model.stage is Stage.PRETRAIN:
        lines.append("It continues text. It was not taught to answer questions or to refuse anything.")
    else:
        lines.append("It was not tested for safety or bias, and may state what is false with confidence.")
    if _lora(facts.model).get("quantization", "none") != "none":
        lines.append(
            "The adapter was trained on a base model in 4 bits. On the base in full precision its outputs differ "
            "slightly; the merged model is the one that was measured."
        )
    if not facts.licence:
        lines.append("Nobody has stated a licence: find out what the sources and the base model allow before using it.")
    lines.append("It knows the languages and the subjects of its sources, and nothing later than they are.")
    return "\n".join(f"- {line}" for line in lines)


def _scores(manifest: Manifest) -> bool:
    spec = spec_of_kind(manifest.kind)
    return spec is not None and spec.scores


def _lora(manifest: Manifest) -> Mapping[str, Any]:
    """Settings of the adapter, empty when all parameters were trained."""
    found = manifest.config.get("lora")
    return found if isinstance(found, Mapping) and found.get("rank") else {}


def _trained(family: Iterable[Manifest]) -> list[Stage]:
    """The stages on the model's own line; the reward model that PPO was scored by is no part of its weights."""
    model = list(family)[-1]
    line = [model]
    by_fingerprint = {manifest.fingerprint: manifest for manifest in family}
    while True:
        inputs = {entry.role: entry.fingerprint for entry in line[-1].inputs}
        before = by_fingerprint.get(inputs.get("model") or inputs.get("base_model") or "")
        if before is None or before in line:
            return [manifest.stage for manifest in reversed(line)]
        line.append(before)


def _sources(family: Iterable[Manifest]) -> list[SourceEntry]:
    return list(dict.fromkeys(source for manifest in family for source in manifest.sources))


def _hub_models(family: Iterable[Manifest]) -> list[str]:
    found = (source.uri for source in _sources(family) if source.kind is SourceKind.MODEL)
    return list(dict.fromkeys(name for uri in found if (name := uri.removeprefix("hf://")) and _is_hub_id(name)))


def _hub_datasets(family: Iterable[Manifest]) -> list[str]:
    found = (source.uri for source in _sources(family) if source.kind is SourceKind.DATA)
    names = (hub_name(uri) for uri in found if uri.startswith("hf://"))
    return list(dict.fromkeys(name for name in names if _is_hub_id(name)))


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and "/" in name


def _public(source: SourceEntry) -> str:
    """How strangers may know a source."""
    if source.uri.startswith("hf://") or (source.kind is SourceKind.MODEL and _is_hub_id(source.uri)):
        return source.uri
    return _last_part(source.uri)


def _last_part(address: str) -> str:
    """`chats.jsonl` of `s3://bucket/team/chats.jsonl#weight=0.3`; names without an address as they are."""
    if not _ADDRESS.match(address):
        return without_logins(address)
    path = re.sub(r"[?#].*", "", without_logins(address), flags=re.DOTALL)
    return path.rstrip("/").rpartition("/")[2] or "a folder"


def _without_addresses(value: Any) -> Any:
    """Settings without the addresses inside the deployment, in keys and values; those of the hub stay."""
    match value:
        case Mapping():
            return {_without_addresses(key): _without_addresses(entry) for key, entry in value.items()}
        case [*entries]:
            return [_without_addresses(entry) for entry in entries]
        case str() if not value.startswith("hf://"):
            if _ADDRESS.match(value) and not re.search(r"\s", value):
                return _last_part(value)
            return _WITHIN.sub(lambda found: _last_part(found[0]), value)
        case _:
            return value
