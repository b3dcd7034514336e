"""A model card in Hugging Face's format: a header for the hub, then where the model came from and what it is worth.

All of it is copied from manifests. Cards are read by strangers, so addresses inside the deployment (folders, buckets)
are left out: a source is named by its last part and its digest, data sets and models of the hub in full.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.config.errors import without_logins
from stages.config.graph import Stage, spec_of_kind
from stages.config.markdown import block, code, plain, table
from stages.config.places import hub_name
from stages.config.request import Manifest, SourceEntry, SourceKind
from stages.config.text import compact, duration
from stages.reporting.sizes import size_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_ADDRESS = re.compile(r"[a-z0-9+]+://|[/~]|\.{1,2}/")
_DIGITS = 12


@dataclass(frozen=True)
class CardFacts:
    """What a card says that is not in the manifests."""

    title: str
    family: Sequence[Manifest]
    """The model's manifest last, before it those of everything that it was made from, in the order of the pipeline."""
    dtype: str
    parameters: int
    evaluation: Manifest | None = None
    """The newest evaluation that measured the model."""
    licence: str = ""
    is_adapter: bool = False
    base: str = ""
    """Of an adapter: where its base model is found, as adapter_config.json says."""
    base_revision: str = ""
    missing: str = ""
    """Why `family` is not complete; empty when it is."""
    gguf: str = ""
    """Name of the GGUF file in the folder."""

    @property
    def model(self) -> Manifest:
        return self.family[-1]


def model_card(facts: CardFacts) -> str:
    """Return README.md: the header in YAML, then Markdown."""
    parts = [
        f"# {plain(facts.title)}",
        _summary(facts),
        "## Use it",
        _use(facts),
        "## Where it came from",
        _lineage(facts),
        "## Measured on held-out data",
        _measured(facts),
        "## Make it again",
        _reproduce(facts),
        "## Limits",
        _limits(facts),
    ]
    return f"---\n{_header(facts)}---\n\n" + "\n\n".join(parts) + "\n"


def _header(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    scores = _scores(facts.model)
    bases = [facts.base] if facts.is_adapter and _is_hub_id(facts.base) else _hub_models(facts.family)
    data = ModelCardData(
        license=facts.licence or "unknown",
        base_model=bases or None,
        base_model_relation=None if not bases else "adapter" if facts.is_adapter else "finetune",
        datasets=_hub_datasets(facts.family) or None,
        tags=["athanor", *(stage.value for stage in _trained(facts.family)), *(["lora"] if _lora(facts.model) else [])],
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
    )
    return f"{data.to_yaml()}\n"


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
    return f"{what}, made by Athanor: {compact(facts.parameters)} parameters in {facts.dtype}.{start}" + (
        f"\n\n> {note}" if note else ""
    )


def _article(label: str) -> str:
    """Of a stage's label, some of which are read letter by letter."""
    return "An" if label.startswith("SFT") else "A"


def _size_note(facts: CardFacts) -> str:
    """By the whole model's parameters, also for an adapter; what the manifests say includes the files' headers."""
    size = size_of(facts.model, facts.family)
    return size.note() if facts.is_adapter else replace(size, parameters=facts.parameters).note()


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
            (plain(source.role), plain(_public(source)), code(source.digest.removeprefix("sha256:")[:_DIGITS]))
            for source in sources
        ]
        parts.append(table(("came from outside", "what", "digest"), outside))
    if facts.missing:
        parts.append(f"This is not all: {plain(facts.missing, at_most=500)}.")
    parts.append(
        "Digests are cut to twelve digits here. Those who have the store get all of it from "
        f"`python -m stages.lineage ancestors` of {code(f'{facts.model.kind}/{facts.model.fingerprint}')}."
    )
    return "\n\n".join(parts)


def _measured(facts: CardFacts) -> str:
    own = [(plain(name), f"{value:.6g}") for name, value in sorted(facts.model.metrics.items())]
    parts = [table(("at the end of its training", "value"), own)] if own else []
    if facts.evaluation is not None:
        role = next(entry.role for entry in facts.evaluation.inputs if entry.digest == facts.model.digest)
        prefix = f"{role}/"
        found = sorted(
            (name.removeprefix(prefix), value)
            for name, value in facts.evaluation.metrics.items()
            if name.startswith(prefix)
        )
        if found:
            head = (f"evaluated {facts.evaluation.created_at[:10]}", "value")
            parts.append(table(head, [(plain(name), f"{value:.6g}") for name, value in found]))
            parts.append(
                "Scores and win rates are those of the run's own reward model, against the SFT model: they say how "
                "well the model pleases it."
            )
    return "\n\n".join(parts) or "Nothing was measured: the run held no data back."


def _reproduce(facts: CardFacts) -> str:
    execution = facts.model.execution
    versions = execution.get("versions")
    known = versions.items() if isinstance(versions, Mapping) else ()
    commit = str(execution.get("git_commit", ""))
    made_with = [f"{name} {version}" for name, version in known if version != "not installed"]
    lines = [
        "The same settings and the same inputs have the same fingerprints; on CPUs they give the same weights.",
        f"Code: Athanor{f', commit {code(commit)}' if commit else ''}."
        + (f" Libraries: {plain(', '.join(map(str, made_with)))}." if made_with else "")
        + f" The last stage took {duration(facts.model.cost.wall_seconds)}.",
    ]
    for manifest in facts.family:
        settings = json.dumps(_without_addresses(manifest.config), indent=1, ensure_ascii=False, sort_keys=True)
        lines.append(
            f"<details><summary>Settings of {plain(manifest.stage.value)} (version {manifest.version})</summary>\n\n"
            f"{_json_block(settings)}\n\n</details>"
        )
    return "\n\n".join(lines)


def _json_block(text: str) -> str:
    fenced = block(text)
    return fenced.replace("text\n", "json\n", 1)


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
            return _last_part(value) if _ADDRESS.match(value) and "\n" not in value else value
        case _:
            return value
