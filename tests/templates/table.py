"""Try published chat templates and write the table of docs/CHAT_TEMPLATES.md; run by hand, on templates of your own.

    python -m tests.templates.table FOLDER > table.md

FOLDER has the templates and `templates.json`, a list of {"file", "name", "source"} and, where known, "bos_token" and
"eos_token". The templates' own tokenizers are not needed: each is tried with a byte-level tokenizer made for it, which
has every control token that the template writes, marked as special, and <think>, <tool_call> and the like as added
words that are not, as most published tokenizers have them.

Accepted means: for five conversations that the template can hold, ids and generation prompts equal those of
transformers' `apply_chat_template`; where the template's markers are used, the mask equals transformers'; where spans
are inferred, every trained stretch is an answer and its end token.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stages.config.errors import ConfigError
from stages.config.tokens import AUTO
from stages.data.pairs.turns import Message, Unusable
from stages.data.tokens.chat import ChatEncoder
from stages.data.tokens.shape import ThinkingForm
from stages.data.tokens.template import TODAY, ChatTemplate
from stages.data.tokens.tokenizer import LoadedTokenizer, with_spans

FAMILIES = (
    ("DeepSeek", r"deepseek"),
    ("SmolLM", r"smollm"),
    ("OLMo, Tülu", r"olmo|tulu"),
    ("Mistral", r"mistral|mixtral|devstral|pixtral|ministral"),
    ("Phi", r"\bphi|^phi"),
    ("Qwen", r"qwen|qwq|qvq"),
    ("Gemma", r"gemma"),
    ("Granite", r"granite"),
    ("Falcon", r"falcon"),
    ("Command R, Aya", r"cohere|command|aya"),
    ("Yi", r"^yi"),
    ("GLM", r"glm|codegeex"),
    ("Llama", r"llama"),
    ("Vicuna, Alpaca, Zephyr", r"vicuna|alpaca|zephyr|^chatml"),
    ("gpt-oss", r"gpt-?oss"),
)
_ENDS = (
    ("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    ("<\uff5cAssistant\uff5c>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    ("<end_of_turn>", "<bos>", "<eos>"),
    ("<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>"),
    ("<|eot|>", "<|begin_of_text|>", "<|eot|>"),
    ("<|im_end|>", "<|endoftext|>", "<|im_end|>"),
    ("<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>"),
    ("<|return|>", "<|startoftext|>", "<|return|>"),
    ("[gMASK]", "", "<|endoftext|>"),
    ("[|endofturn|]", "[BOS]", "[|endofturn|]"),
    ("<seed:eos>", "<seed:bos>", "<seed:eos>"),
    ("<_end>", "<_start>", "<_end>"),
)
"""Of a control token that a template writes: begin and end token of the tokenizers that have it."""
_CONTROLS = re.compile(
    r"<[|\uff5c][^<>{}'\"\s]{1,40}[|\uff5c]>|</?s>|<[a-z]+_of_[a-z]+>|<reserved_\d+>|<SPECIAL_\d+>|<extra_id_\d+>"
    r"|\[\|[^\[\]|\s]{1,40}\|\]|<seed:\w+>|<_[a-z]+>|<sep>|<sop>|\[gMASK\]|<bos>|<eos>|<\|?turn\|?>|<turn\|>|<\|turn>|<end_of_utterance>|]~!b\[|]~b]|\[e~\["
)
_BRACKETS = re.compile(r"\[/?[A-Z_]{3,}\]")
_WORDS = re.compile(r"</?(?:think|tool_call|tool_response|tools)>")

_QUESTION, _ANSWER = "What does 'it' do?\n\n  1. sorts", "it  sorts\n\tlists, <b>all</b>"
_TALK: list[Message] = [
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "1 + 1 = 2"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "no more"},
]
_SYSTEM: Message = {"role": "system", "content": "Be brief."}


@dataclass(frozen=True)
class Result:
    accepted: bool
    how: str
    """How spans were found, or why not."""
    system: str = ""
    thinking: str = ""
    tools: str = ""


def byte_level(controls: list[str], words: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([turn["content"] for turn in _TALK] * 5, trainer)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in controls])
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in words])
    return made


def tokenizer_for(text: str, bos: str | None, eos: str | None) -> LoadedTokenizer:
    """A tokenizer with the control tokens that the template's text or its renderings hold."""
    known = next(((begin, end) for mark, begin, end in _ENDS if mark in text), ("<s>", "</s>"))
    names = {"bos_token": known[0] if bos is None else bos, "eos_token": known[1] if eos is None else eos}
    written = text
    try:
        written += "".join(ChatTemplate(text, names).samples())
    except ConfigError:
        pass  # refused for the same reason below
    found = set(_CONTROLS.findall(written)) | ({*_BRACKETS.findall(written)} if "<<SYS>>" not in text else set())
    controls = sorted(found | {name for name in names.values() if name})
    backend = byte_level(controls, sorted(set(_WORDS.findall(written)) - set(controls)))
    return LoadedTokenizer(backend, text, {**names, "pad_token": names["eos_token"]}, 4096)


def tried(text: str, bos: str | None = None, eos: str | None = None) -> Result:
    """Whether a template is accepted, and how."""
    try:
        given = tokenizer_for(text, bos, eos)
        made = with_spans(given, AUTO)
        chat = made.chat()
        try:
            chat.check()
            how = ""
        except ConfigError:
            chat.check(only_last_turn=True)
            how = ", with `trained_turns: last`"
    except ConfigError as error:
        return Result(False, str(error).removeprefix("the chat template ").removeprefix("of "))
    closed = f", closed with `{chat.usual_end}`" if made.chat_template != text else ""
    system = compare(made, chat, only_last=bool(how))
    form = ChatTemplate(made.chat_template, made.special_tokens).form
    spans = "inferred" if made.infer_spans else "markers"
    return Result(
        True,
        spans + closed + how,
        system,
        {ThinkingForm.FIELD: "field", ThinkingForm.INLINE: "inline", ThinkingForm.NONE: "left out"}[form.thinking],
        tools(chat),
    )


def compare(made: LoadedTokenizer, chat: ChatEncoder, *, only_last: bool) -> str:
    """Raise AssertionError unless ids, prompts and masks are right; return what becomes of system messages."""
    made.backend.encode_special_tokens = False
    plain: Any = PreTrainedTokenizerFast(tokenizer_object=made.backend, **made.special_tokens)
    template = ChatTemplate(made.chat_template, made.special_tokens)
    plain.chat_template = template.dated  # transformers knows today only
    system = "kept"
    for messages in (_TALK[:2], _TALK[:4], _TALK, [_SYSTEM, *_TALK[:2]], [_SYSTEM, *_TALK[:4]]):
        try:
            encoded = chat.encode(messages)
        except Unusable as error:
            if messages[0] is not _SYSTEM:
                raise AssertionError(f"{error} at encoding, after it passed the check") from error
            system = "refused" if error.reason == "refused_by_template" else "left out" if system == "kept" else system
            continue
        extra: dict[str, Any] = {"date_string": TODAY.strftime("%d %b %Y"), "return_dict": True}
        asked: Any = messages
        if template.form.as_parts:
            asked = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        if template.form.wants_tools:
            extra["tools"] = []
        expected = plain.apply_chat_template(asked, **extra, return_assistant_tokens_mask=not made.infer_spans)
        assert encoded.ids.tolist() == list(expected["input_ids"]), "ids"
        if not made.infer_spans:
            assert encoded.loss_mask.tolist() == list(expected["assistant_masks"]), "mask"
        prompt = plain.apply_chat_template(asked[:-1], **extra, add_generation_prompt=True)["input_ids"]
        assert chat.encode_prompt(messages[:-1]).tolist() == list(prompt), "prompt"
        _require_spans(made, chat, messages, only_last=only_last)
    return system


def _require_spans(made: LoadedTokenizer, chat: ChatEncoder, messages: list[Message], *, only_last: bool) -> None:
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    end = chat.check(only_last_turn=only_last)
    for number in answers[-1:] if only_last else answers:
        encoded = chat.encode(messages, turns={number})
        trained = encoded.ids[encoded.loss_mask == 1].tolist()
        shown = made.backend.decode(trained, skip_special_tokens=False)
        assert end in trained, f"no end in {shown!r}"
        assert messages[number]["content"] in shown, f"no answer in {shown!r}"
        others = [
            text["content"] for place, text in enumerate(messages) if place != number and len(text["content"]) > 1
        ]
        assert not any(other in shown for other in others), f"another turn in {shown!r}"


def tools(chat: ChatEncoder) -> str:
    """What becomes of a conversation with a call."""
    call = {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": {"first": 1, "to": "2"}}}
    schema = {"type": "object", "properties": {"first": {"type": "integer", "description": "A number"}}, "required": []}
    tool = {"type": "function", "function": {"name": "add", "description": "Add", "parameters": schema}}
    messages: list[Message] = [
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "tool_call_id": "call12345", "content": '{"sum": 3}'},
        {"role": "assistant", "content": "It is 3."},
    ]
    outcomes = []
    for given in ([tool], []):
        try:
            chat.encode(messages, tools=given)
        except Unusable as error:
            outcomes.append("left out" if error.reason.startswith(("tools_left", "left")) else "refused")
        else:
            return "rendered" if given else "calls only"
    return outcomes[-1]


def family_of(name: str) -> str:
    return next((family for family, pattern in FAMILIES if re.search(pattern, name.lower())), "others")


def main() -> None:
    parser = argparse.ArgumentParser(description="Try published chat templates.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    rows: list[tuple[str, str, str]] = []
    counts: Counter[bool] = Counter()
    for entry in json.loads((folder / "templates.json").read_text()):
        text = (folder / entry["file"]).read_text()
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        try:
            result = tried(text, entry.get("bos_token"), entry.get("eos_token"))
        except AssertionError as error:
            print(f"{entry['name']} of {entry['source']}: {error}", file=sys.stderr)
            result = Result(False, f"DIFFERS: {error}")
        counts[result.accepted] += 1
        how = result.how.replace("|", "\\|").replace("\n", " ")
        cells = (entry["name"], entry["source"], f"`{digest}`", "yes" if result.accepted else "no", how)
        line = " | ".join((*cells, result.system, result.thinking, result.tools))
        rows.append((family_of(entry["name"]), entry["name"].lower(), line))
    print(f"{counts[True]} accepted, {counts[False]} refused.\n")
    print("| family | template | from | sha256 | accepted | spans, or why not | system | thinking | tools |")
    print("|---|---|---|---|---|---|---|---|---|")
    for family, _, line in sorted(rows):
        print(f"| {family} | {line} |")


if __name__ == "__main__":
    main()
