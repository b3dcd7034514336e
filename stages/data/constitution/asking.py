"""What a critic is asked: worked examples as turns of a chat, then the question itself.

The examples show the form to small models, which would otherwise answer the question instead of judging the response.
They are part of the result: a change to them raises the version of the stage.
"""

from collections.abc import Sequence

from stages.config.principles import Principle
from stages.data.constitution.prompts import Prompt
from stages.data.pairs.turns import Message

_CRITIQUE = (
    "Question:\n{question}\n\nResponse:\n{response}\n\nCritique request: {request}\n"
    "Say it in one to three sentences about the response."
)
_REVISION = (
    "Question:\n{question}\n\nResponse:\n{response}\n\nCritique:\n{critique}\n\nRevision request: {request}\n"
    "Write the new response to the question and nothing else."
)
_COMPARISON = (
    "Question:\n{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n{request} Reply with one letter, A or B."
)

_SEA = (
    "Why is the sea salty?",
    "The sea is salty because fish put salt into it. Rivers are salty too. Rivers are salty too.",
    "Which statement of the response is wrong, or probably wrong? Quote it, and say what is true.",
    '"Fish put salt into it" is wrong: the salt comes from rocks, out of which rain and rivers wash it. "Rivers are '
    'salty too" is also wrong, and it is said twice.',
    "Rewrite the response with every wrong statement corrected or left out.",
    "The sea is salty because rain and rivers wash salt out of rocks and carry it to the sea. Water evaporates and the "
    "salt stays, so it has become more over millions of years.",
)
_NEIGHBOUR = (
    "My neighbour's dog barks all night. What can I do?",
    "Your neighbour is an idiot. Throw stones at the dog until it stops.",
    "Does the response help anyone to hurt a person or an animal? Name the sentence that does.",
    'Yes. "Throw stones at the dog" tells the reader to hurt an animal, which is cruel, and it would not stop the '
    "barking.",
    "Rewrite the response so that nothing in it helps to hurt a person or an animal.",
    "Talk to your neighbour first: they may not know that the dog barks at night. If that does not help, keep a record "
    "of the times and ask your town which rules about noise there are.",
)

WORKED_EXAMPLES = (_SEA, _NEIGHBOUR)
"""The texts of the worked examples: question, response, critique request, critique, revision request, revision."""


def question_of(prompt: Prompt) -> str:
    """The conversation as one text: of a single turn, the turn itself."""
    turns = [turn for turn in prompt.messages if turn["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    names = {"user": "User", "assistant": "Assistant"}
    return "\n\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in turns)


def critique_messages(prompt: Prompt, response: str, principle: Principle) -> list[Message]:
    """Ask what is wrong with a response, by a principle."""
    return _chat(
        [(_CRITIQUE.format(question=q, response=r, request=c), answer) for q, r, c, answer, _, _ in WORKED_EXAMPLES],
        _CRITIQUE.format(question=question_of(prompt), response=response, request=principle.critique),
    )


def revision_messages(prompt: Prompt, response: str, critique: str, principle: Principle) -> list[Message]:
    """Ask for a better response, by a principle and the critique."""
    return _chat(
        [
            (_REVISION.format(question=q, response=r, critique=c, request=request), answer)
            for q, r, _, c, request, answer in reversed(WORKED_EXAMPLES)
        ],
        _REVISION.format(
            question=question_of(prompt), response=response, critique=critique, request=principle.revision
        ),
    )


def comparison_messages(question: str, first: str, second: str, principle: Principle) -> list[Message]:
    """Ask which of two responses is better, by a principle. Of the examples each letter is right once."""
    sea, _, _, _, _, salt = _SEA
    dog, stones, _, _, _, talk = _NEIGHBOUR
    truth, harm = "Which response has fewer wrong statements?", "Which response does less harm?"
    return _chat(
        [
            (_COMPARISON.format(question=dog, first=stones, second=talk, request=harm), "B"),
            (_COMPARISON.format(question=sea, first=salt, second=_SEA[1], request=truth), "A"),
        ],
        _COMPARISON.format(question=question, first=first, second=second, request=principle.comparison),
    )


def _chat(examples: Sequence[tuple[str, str]], asked: str) -> list[Message]:
    turns = [
        turn
        for question, answer in examples
        for turn in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    return [*turns, {"role": "user", "content": asked}]
