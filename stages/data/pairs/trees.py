"""The best-ranked path of each OpenAssistant tree, in which people wrote and ranked several replies to one message.

At every fork the reply with the lowest rank is taken; replies without a rank come last, then file order decides.
An unanswered question is skipped when another question of the fork was answered.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.data.pairs.turns import ROLES, Conversation, Message, Unusable, as_conversation, plain_text


@dataclass
class Node:
    """One message with the usable replies to it, in file order."""

    key: str
    role: str
    text: str
    rank: float | None
    replies: list["Node"] = field(default_factory=list)

    @property
    def message(self) -> Message:
        return {"role": self.role, "content": self.text}


@dataclass(frozen=True)
class MessageOutcome:
    """What became of one message of a table: the conversation that begins with it, or a reason."""

    key: str
    conversation: Conversation | None
    reason: str = ""


def best_path(root: Node) -> list[Node]:
    """From the root down the best-ranked replies."""
    path, node = [root], root
    while node.replies:
        choices = list(enumerate(node.replies))
        if answered := [choice for choice in choices if choice[1].role != "user" or choice[1].replies]:
            choices = answered
        node = min(choices, key=lambda choice: (choice[1].rank is None, choice[1].rank or 0, choice[0]))[1]
        path.append(node)
    return path


def nested_conversation(values: Mapping[str, Any]) -> Conversation:
    """The best-ranked path of a row that holds a whole tree under `prompt`, with `replies` inside each other."""
    try:
        root = _nested(values.get("prompt"))
    except RecursionError:  # hundreds of messages deep
        raise Unusable("malformed_turn") from None
    if root is None:
        raise Unusable("deleted")
    return as_conversation([node.message for node in best_path(root)])


def _nested(values: object) -> Node | None:
    if not isinstance(values, Mapping):
        raise Unusable("malformed_turn")
    if _gone(values):
        return None
    node = _node("", values)
    replies = values.get("replies") or []
    if not isinstance(replies, list):
        raise Unusable("malformed_turn")
    node.replies = [reply for reply in map(_nested, replies) if reply is not None]
    return node


def _node(key: str, values: Mapping[str, Any]) -> Node:
    role, rank = values.get("role"), values.get("rank")
    if not isinstance(role, str):
        raise Unusable("malformed_turn")
    if role not in ROLES:
        raise Unusable("unknown_role")
    is_number = isinstance(rank, int | float) and not isinstance(rank, bool) and rank == rank  # NaN is no rank
    return Node(key, ROLES[role], plain_text(values.get("text")), rank if is_number else None)


def _gone(values: Mapping[str, Any]) -> str:
    if values.get("deleted") is True:
        return "deleted"
    return "failed_review" if values.get("review_result") is False else ""


def conversations_of(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[MessageOutcome]:
    """Trees out of a table with one message a row; each row has exactly one outcome, in the order of the rows.

    The row of the root stands for the conversation; the other rows of the path are counted as `joined`.
    """
    nodes: dict[str, Node] = {}
    reasons: dict[str, str] = {}
    for key, values in rows:
        try:
            if reason := _gone(values):
                raise Unusable(reason)
            name = values.get("message_id")
            if not isinstance(name, str):
                raise Unusable("malformed_turn")
            if name in nodes:
                raise Unusable("repeated_message")
            nodes[name] = _node(key, values)
        except Unusable as error:
            reasons[key] = error.reason
    roots = _linked(rows, nodes, reasons)
    made = _walked(roots, reasons)
    for key, _ in rows:
        yield MessageOutcome(key, made.get(key), reasons.get(key, "" if key in made else "parent_missing"))


def _linked(
    rows: Sequence[tuple[str, Mapping[str, Any]]], nodes: Mapping[str, Node], reasons: Mapping[str, str]
) -> list[Node]:
    """Hang every usable message under its parent; return those that have none."""
    roots: list[Node] = []
    for key, values in rows:
        if key in reasons:
            continue
        node, parent = nodes[values["message_id"]], values.get("parent_id")
        if not parent:
            roots.append(node)
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent].replies.append(node)
    return roots


def _walked(roots: Sequence[Node], reasons: dict[str, str]) -> dict[str, Conversation]:
    """Conversations by the key of their root; every other message that a root reaches gets its reason."""
    made: dict[str, Conversation] = {}
    for root in roots:
        path = best_path(root)
        for node in _below(root):
            reasons[node.key] = "not_best_ranked"
        try:
            made[root.key] = as_conversation([node.message for node in path])
        except Unusable as error:
            reasons |= dict.fromkeys((node.key for node in path), error.reason)
            continue
        del reasons[root.key]
        reasons |= {node.key: "joined" for node in path[1:]}
        if "unanswered_last_turn" in made[root.key].changes:
            reasons[path[-1].key] = "unanswered"
    return made


def _below(root: Node) -> Iterator[Node]:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.replies
