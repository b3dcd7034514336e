"""Conversations to token ids, with a mask over what the assistant said.

The ids are those of `apply_chat_template`, with two promises that it does not make: a special string inside a message
never becomes a special id, and the token that ends an assistant's turn is trained even when it doubles as padding,
because the mask comes from the rendered template and not from comparing ids.

How: the template is rendered around placeholders, once for each structure of a conversation. Every control token that
the template wrote is replaced by a stand-in, the texts are put in, and the whole is encoded by a copy of the tokenizer
that knows the stand-ins and takes control tokens for plain text.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from stages.config.errors import ConfigError
from stages.data.pairs.turns import Message, Unusable
from stages.data.tokens.controls import RESERVED, control_tokens, copy_with_stand_ins, encodable
from stages.data.tokens.shape import given_as_it_is, shaped
from stages.data.tokens.skeleton import Cutter, Skeleton, Turn
from stages.data.tokens.template import ADVICE, PROBE, TODAY, ChatTemplate

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The template of tokenizers that we train: everything around a message's text is a special token."""

_KEPT = 4096
"""Skeletons that are kept: plain conversations need few, those with calls nearly one each."""


@dataclass(frozen=True)
class EncodedChat:
    """Ids of a conversation; `loss_mask` is 1 on the trained turns of the assistant, end tokens included."""

    ids: np.ndarray
    loss_mask: np.ndarray
    thinking_left_out: int = 0
    """How many turns have thinking that the template leaves out."""


_MOST_SHOWN = 120
"""Characters of a prompt in an error."""


class ChatEncoder:
    """Encodes conversations by a chat template; `check` says whether it can be trained with."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str,
        special_tokens: Mapping[str, str],
        *,
        infer_spans: bool = False,
        origin: str = "",
    ) -> None:
        """With `infer_spans`, an assistant's turn reaches from the generation prompt to the control token after its
        text; otherwise the template's {% generation %} markers delimit it. `origin` says in errors where the template
        comes from."""
        self._template = ChatTemplate(chat_template, special_tokens, origin=origin)
        self._special_tokens, self._infer = dict(special_tokens), infer_spans
        self._skeletons: dict[tuple[str, bool], Skeleton] = {}
        self._written = tuple(self._template.samples())
        self._controls = control_tokens(tokenizer, "".join(self._written), set(self._special_tokens.values()))
        self._copy, self._stand_ins, self._real_ids = copy_with_stand_ins(tokenizer, self._controls)
        # Longest first, so that a token is never matched as the beginning of a longer one.
        names = sorted((token.content for token in self._controls.values()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._cutter = Cutter(self._template, self._control, infer=infer_spans)
        self._cutter.usual_end = self._probed_turns()[0].end
        self._cutter.is_closed_by_next = self._opens_questions(self._cutter.usual_end)

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Any] = (), turns: Collection[int] | None = None
    ) -> EncodedChat:
        """Encode a whole conversation; raises Unusable for one that the template cannot hold.

        `turns` are the messages of the assistant that are trained; all of them where it is not given.
        """
        if not self._infer and not self._template.has_markers:
            raise ConfigError(
                f"{self._template.name} has no {{% generation %}} markers, so nothing says which tokens the assistant "
                "wrote",
                advice="Set tokenize.chat_template='auto' to take each assistant turn up to the token that ends it, or "
                "give a template with {% generation %} ... {% endgeneration %} around the assistant's text.",
            )
        return self._encode(messages, tools, turns, add_generation_prompt=False)

    def encode_prompt(self, messages: Sequence[Message], *, tools: Sequence[Any] = ()) -> np.ndarray:
        """Encode what precedes the assistant's next turn, generation prompt included."""
        return self._encode(messages, tools, None, add_generation_prompt=True).ids

    def check(self, *, only_last_turn: bool = False) -> int:
        """Return the id that ends an assistant's turn; raises ConfigError for a template that would train wrongly.

        With `only_last_turn`, nothing is asked of how earlier turns end.
        """
        try:
            whole = self.encode(PROBE)
        except Unusable as error:
            raise self._template.cannot_hold(error) from error
        turns = self._probed_turns()
        ends = [turn.end for turn in turns]
        trained = [self._trains(turn) for turn in turns]
        asked = slice(1, None) if only_last_turn else slice(None)
        if not any(ends):
            raise ConfigError(
                f"{self._template.name} writes no control token after an assistant's turn: a model would not learn to "
                "stop",
                advice="Write {{ eos_token }} after the assistant's text; " + ADVICE,
            )
        if not all(ends[asked]):
            raise ConfigError(
                f"{self._template.name} ends {'an earlier turn' if ends[0] else 'the last turn'} of the assistant with "
                f"{ends[0] or ends[1]!r} and {'the last one' if ends[0] else 'an earlier one'} with no control token",
                advice="Write the token after every text of the assistant; " + ADVICE,
            )
        if not all(trained[asked]):
            shown = self._copy.decode(whole.ids[whole.loss_mask == 1].tolist(), skip_special_tokens=False)
            raise ConfigError(
                f"{self._template.name} does not train each assistant turn with the token that ends it: of two turns "
                f"it trains {sum(trained)}, together {shown!r}",
                advice="Set tokenize.chat_template='infer' to ignore its {% generation %} markers, or move them.",
            )
        if len(set(ends[asked])) > 1:
            raise ConfigError(
                f"{self._template.name} ends the last turn with {ends[1]!r} and an earlier one with {ends[0]!r}: "
                "generation would stop at the first of them only",
                advice="Set tokenize.trained_turns='last'; or " + ADVICE,
            )
        for turn in turns:
            if not turn.is_prompted_as_written:
                raise ConfigError(
                    f"{self._template.name}: its generation prompt {_shown(turn.prompt)} differs from what precedes "
                    f"the assistant's turn in a conversation, {_shown(turn.header)}",
                    advice="A model would be prompted in another way than it was trained; " + ADVICE,
                )
        self._require_one_bos(whole.ids)
        return next(number for number, token in self._controls.items() if token.content == ends[-1])

    def _require_one_bos(self, ids: np.ndarray) -> None:
        """Templates may begin each turn with it; twice in a row it is written by template and tokenizer both."""
        bos = self._copy.token_to_id(self._special_tokens.get("bos_token") or "")
        if bos is not None and (ids[:2] == bos).all():
            raise ConfigError(f"{self._template.name} writes the begin token 2 times at its begin", advice=ADVICE)

    @property
    def marks_turns(self) -> bool:
        """Whether the template's markers enclose each turn with the token that ends it."""
        return self._template.has_markers and all(map(self._trains, self._probed_turns()))

    @property
    def missing_end(self) -> str:
        """The control token that follows an assistant's turn only when another turn comes after it, if so."""
        first, last = self._probed_turns()
        # What also opens the assistant's turns cannot end them, and a template without ends is no template to repair.
        return "" if last.end or not first.end or first.end in last.header else first.end

    @property
    def usual_end(self) -> str:
        """The control token that ends a turn of text."""
        return self._cutter.usual_end

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about the template, in sentences."""
        turn = self._probed_turns()[-1]
        said = [
            f"{self._template.name}: spans of the assistant's turns "
            + ("are inferred from its rendering" if self._infer else "come from its {% generation %} markers")
        ]
        if not turn.header.startswith(turn.prompt):
            said.append(
                f"its generation prompt is {turn.prompt!r}, but turns without thinking begin with {turn.header!r}"
            )
        if self._template.prints_the_date:
            said.append(f"where it prints today's date, that is {TODAY:%d %b %Y}")
        return tuple(said)

    def begins_with(self, token: str) -> bool:
        """Whether the template writes this token first."""
        return self._written[0].startswith(token)

    @property
    def control_ids(self) -> Collection[int]:
        """Ids of the tokens that control the model; text that spells one out is ordinary text."""
        return self._controls.keys()

    def _probed_turns(self) -> tuple[Turn, ...]:
        return self._probed().turns

    def _probed(self) -> Skeleton:
        try:
            return self._cutter.skeleton(shaped(PROBE, (), self._template.form), with_turns=True)
        except Unusable as error:
            raise self._template.cannot_hold(error) from error

    def _opens_questions(self, end: str) -> bool:
        """Whether the token that ends the assistant's turns is the one that opens the user's, as GLM has it."""
        before: list[list[str]] = [[]]
        for piece in self._probed().pieces:
            if piece.place:
                before.append([])
            else:
                before[-1] += self._control.findall(piece.text)
        return before[0][-1:] == before[2] == [end]

    def _trains(self, turn: Turn) -> bool:
        """Whether a turn of the probe is trained up to its end, which is the first control token after its text."""
        pieces = self._probed().pieces
        number = next(number for number, piece in enumerate(pieces) if piece.place and piece.place.slot == turn.message)
        if pieces[number].turn != turn.message or not turn.end:
            return False
        for piece in pieces[number + 1 :]:
            if piece.place or piece.turn != turn.message:
                return False
            if turn.end in piece.text:
                return True
        return False

    def _encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any],
        turns: Collection[int] | None,
        *,
        add_generation_prompt: bool,
    ) -> EncodedChat:
        as_it_is = given_as_it_is(messages, tools)
        if as_it_is and (self._control.search(as_it_is) or RESERVED in as_it_is):
            raise Unusable("control_token_in_tools")
        skeleton, fills = self._skeleton(messages, tools, add_generation_prompt=add_generation_prompt)
        texts: list[str] = []
        trained: list[np.ndarray] = []
        for piece in skeleton.pieces:
            if piece.place:
                text = piece.place.filled(fills[piece.place.slot])
                # A stand-in inside a message would become a control token, which is what this class rules out.
                if RESERVED in text:
                    raise Unusable("reserved_character")
            else:
                text = self._control.sub(lambda control: self._stand_ins[control[0]], piece.text)
            texts.append(text)
            is_trained = piece.turn is not None and (turns is None or piece.turn in turns)
            trained.append(np.full(len(text), is_trained))
        with encodable():
            encoding = self._copy.encode("".join(texts), add_special_tokens=False)
        ids = self._real_ids[np.asarray(encoding.ids, dtype=np.int64)]
        # before[i] counts the trained characters before character i, so a token is trained when its range of
        # characters holds at least one of them: that decides for tokens which cross the border of a piece.
        before = np.concatenate([[0], np.cumsum(np.concatenate(trained))])
        starts, stops = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        return EncodedChat(ids, (before[stops] > before[starts]).astype(np.int64), skeleton.left_out)

    def _skeleton(
        self, messages: Sequence[Message], tools: Sequence[Any], *, add_generation_prompt: bool
    ) -> tuple[Skeleton, list[str]]:
        """The rendered template, cut, and the texts that belong in its places."""
        conversation = shaped(messages, tools, self._template.form)
        key = (conversation.key, add_generation_prompt)
        if key not in self._skeletons:
            if len(self._skeletons) >= _KEPT:
                self._skeletons.clear()
            made = self._cutter.skeleton(conversation, add_generation_prompt=add_generation_prompt, with_turns=False)
            self._skeletons[key] = made
        return self._skeletons[key], [slot.text for slot in conversation.slots]


def _shown(text: str) -> str:
    """A prompt may hold a page of instructions; where it differs is at its end or begin."""
    return repr(text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN // 2]} ... {text[-_MOST_SHOWN // 2 :]}")
