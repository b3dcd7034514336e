"""A rendered template cut into pieces: what it wrote, where each text belongs, and what of it is trained in which turn.

A turn's span comes from the template's {% generation %} markers, or it is inferred: it begins where the generation
prompt ends, and ends with the control token that closes the turn. Both are looked up next to the turn's own texts, so
it does not matter that some templates render earlier turns otherwise once another turn follows.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from stages.data.pairs.turns import Unusable
from stages.data.tokens.shape import Kind, Placeholder, Shaped, after_last_placeholder, placeholders
from stages.data.tokens.template import ChatTemplate


@dataclass(frozen=True)
class Piece:
    """Part of a rendered template: text that it wrote, or the place of a text."""

    text: str
    turn: int | None
    """The message of the assistant that trains this piece; None where none does."""
    place: Placeholder | None = None


@dataclass(frozen=True)
class Turn:
    """An assistant's turn in a rendered template."""

    message: int
    start: int
    stop: int
    end: str
    """The control token that closes it, empty where ordinary text follows or nothing."""
    header: str
    """What the template writes before the turn's first text, from the message before."""
    prompt: str
    """What it writes there as a generation prompt."""

    @property
    def is_prompted_as_written(self) -> bool:
        """Whether one of the two begins with the other, because a turn may begin with text that the model is to write
        itself, or they differ in marks of thinking only: a prompt may open a block that a turn without does not have.
        """
        header, prompt = (_bare(text) for text in (self.header, self.prompt))
        return self.header.startswith(self.prompt) or self.prompt.startswith(self.header) or header == prompt


_THINKING_MARKS = re.compile(r"</?[\w:]*think\w*>|\[/?THINK\]|<\|(?:START|END)_(?:THINKING|RESPONSE)\|>", re.IGNORECASE)
"""How templates begin and end what a model thinks: Qwen and DeepSeek, Mistral, Command R."""


def _bare(text: str) -> str:
    """A text without marks of thinking, and without the space around them."""
    return re.sub(rf"\s*(?:{_THINKING_MARKS.pattern})\s*", "", text, flags=re.IGNORECASE)


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _shared(header: str, prompt: str) -> int:
    """How much of the header the prompt has, without half a mark."""
    length = _common(header, prompt)
    cut = [mark.start() for mark in _THINKING_MARKS.finditer(header) if mark.start() < length < mark.end()]
    return cut[0] if cut else length


@dataclass(frozen=True)
class Skeleton:
    pieces: tuple[Piece, ...]
    turns: tuple[Turn, ...]
    left_out: int
    """How many turns have thinking that the template leaves out."""


class Cutter:
    """Cuts renderings of one template; `control` matches the tokens that control the model."""

    def __init__(self, template: ChatTemplate, control: re.Pattern[str], *, infer: bool) -> None:
        self._template, self._control, self._infer = template, control, infer
        self.usual_end = ""
        """The token that closes turns of text, once it is known: a turn that calls may hold other tokens before it."""
        self.is_closed_by_next = False
        """Whether turns have no token of their own at the end, but the one that opens the next turn."""

    def skeleton(self, conversation: Shaped, *, add_generation_prompt: bool = False, with_turns: bool) -> Skeleton:
        """Render and cut; raises Unusable for a conversation that the template refuses or shows in part.

        Where markers delimit the turns, how each one is prompted and ends is looked up `with_turns` only.
        """
        rendered = self._template.render(conversation, add_generation_prompt=add_generation_prompt)
        places = list(placeholders(rendered.text))
        left_out = _verify(conversation, places)
        turns: list[Turn] = []
        if not add_generation_prompt and (self._infer or with_turns):
            turns = list(self._turns(conversation, rendered.text, places))
        if self._infer or add_generation_prompt:
            spans = [(turn.start, turn.stop, turn.message) for turn in turns]
        else:
            spans = [(*span, _owner(span, conversation, places)) for span in rendered.marked]
        return Skeleton(tuple(_cut(rendered.text, places, spans)), tuple(turns), conversation.untold + left_out)

    def _turns(self, conversation: Shaped, text: str, places: Sequence[Placeholder]) -> Iterator[Turn]:
        owned = _first(places)
        of_message: dict[int, list[int]] = {}
        for number, place in enumerate(owned):
            of_message.setdefault(conversation.slots[place.slot].message, []).append(number)
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            if number not in of_message:  # only thinking, which the template leaves out
                raise Unusable("left_out_by_template")
            mine = of_message[number]
            first, last = owned[mine[0]].start, owned[mine[-1]].stop
            before = owned[mine[0] - 1].stop if mine[0] else 0
            after = owned[mine[-1] + 1].start if mine[-1] + 1 < len(owned) else len(text)
            asked = self._template.render(conversation, count=number, add_generation_prompt=True).text
            prompt = after_last_placeholder(asked)
            header = text[before:first]
            start = before + _shared(header, prompt)
            calls = "tool_calls" in message
            stop, end = (
                self._end(conversation, number, text, last, after) if calls else self._closing(text, last, after)
            )
            turn = Turn(number, start, stop, end, header, prompt)
            yield turn if turn.is_prompted_as_written else Turn(number, first, stop, end, header, prompt)

    def _closing(self, text: str, start: int, limit: int) -> tuple[int, str]:
        """The first control token between the turn's text and the next one's."""
        found = self._control.search(text, start, limit)
        return (found.end(), found[0]) if found else (start, "")

    def _end(self, conversation: Shaped, number: int, text: str, start: int, limit: int) -> tuple[int, str]:
        """The end of a turn that calls. Its arguments and the tokens around them follow the last name, so the first
        control token is not its end."""
        if self.usual_end and (place := text.find(self.usual_end, start, limit)) >= 0:
            return place + len(self.usual_end), self.usual_end
        # Rendered alone, the conversation ends after this turn; what both renderings share belongs to the turn.
        alone = self._template.render(conversation, count=number + 1).text
        tail = after_last_placeholder(alone)
        shared = start + _common(tail, text[start:limit])
        controls = list(self._control.finditer(text, start, limit))
        within = [match for match in controls if match.end() <= shared]
        beyond = [match for match in controls if match.end() > shared]
        chosen = beyond[:1] if self.is_closed_by_next and beyond else within[-1:]
        return (chosen[0].end(), chosen[0][0]) if chosen else (start, "")


def _first(places: Sequence[Placeholder]) -> list[Placeholder]:
    """The first place of each text: some templates name a function again where its answer follows."""
    seen: dict[int, Placeholder] = {}
    for place in places:
        seen.setdefault(place.slot, place)
    return sorted(seen.values(), key=lambda place: place.start)


def _verify(conversation: Shaped, places: Sequence[Placeholder]) -> int:
    """How many texts of thinking are left out; raises Unusable unless all other texts are there, in order and only
    once, or masks would be laid over the wrong text."""
    counts = [0] * len(conversation.slots)
    for place in places:
        counts[place.slot] += 1
    left_out = 0
    for count, slot in zip(counts, conversation.slots, strict=True):
        role = conversation.messages[slot.message]["role"] if slot.message >= 0 else ""
        match slot.kind:
            case Kind.TOOL | Kind.CALL:
                if not count:
                    raise Unusable("tools_left_out_by_template")
            case Kind.CONTENT:
                if count != 1:
                    raise Unusable("tools_left_out_by_template" if role == "tool" else "left_out_by_template")
            case Kind.THINKING:
                left_out += not count
                if count > 1:
                    raise Unusable("left_out_by_template")
    told = [conversation.slots[place.slot] for place in _first(places)]
    # Some templates put the system message into the last question.
    order = [slot.message for slot in told if slot.message >= 0 and not _is_system(conversation, slot.message)]
    if order != sorted(order):
        raise Unusable("left_out_by_template")
    return left_out


def _is_system(conversation: Shaped, message: int) -> bool:
    return conversation.messages[message]["role"] == "system"


def _owner(span: tuple[int, int], conversation: Shaped, places: Sequence[Placeholder]) -> int:
    """The turn that a marked span belongs to: the last one whose text begins before its end."""
    owners = [
        slot.message
        for place in _first(places)
        if (slot := conversation.slots[place.slot]).message >= 0
        and place.start < span[1]
        and conversation.messages[slot.message]["role"] == "assistant"
    ]
    return (
        owners[-1]
        if owners
        else next(number for number, message in enumerate(conversation.messages) if message["role"] == "assistant")
    )


def _cut(text: str, places: Sequence[Placeholder], spans: Sequence[tuple[int, int, int]]) -> Iterator[Piece]:
    position = 0
    edges = sorted({edge for start, stop, _ in spans for edge in (start, stop)})

    def turn_at(place: int) -> int | None:
        return next((turn for start, stop, turn in spans if start <= place < stop), None)

    for place in (*places, None):
        stop = place.start if place else len(text)
        for left, right in _between(position, stop, edges):
            yield Piece(text[left:right], turn_at(left))
        if place:
            yield Piece("", turn_at(place.start), place)
            position = place.stop


def _between(start: int, stop: int, edges: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split [start, stop) at the edges."""
    cuts = [start, *(edge for edge in edges if start < edge < stop), stop]
    return ((left, right) for left, right in pairwise(cuts) if left < right)
