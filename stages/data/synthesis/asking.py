"""What the generator is asked, and how its answers are read. Pure: texts in, texts out.

The steps are those of Self-Instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560, section 2.2), worded for chat
models: new tasks after examples, then an input where a task needs one, then the response to both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

Turns = tuple[dict[str, str], ...]

_ITEM = re.compile(r"^\s*(?:\*\*)?(?:task\s*)?#?\d{1,3}\s*[.):]\s*(?:\*\*)?\s*(.*)$", re.IGNORECASE)
_LABEL = re.compile(r"^(?:\*\*)?(?:task|instruction)\s*:\s*(?:\*\*)?\s*", re.IGNORECASE)
_INPUT_LABEL = re.compile(r"^(?:\*\*)?(?:example\s+)?input\s*:\s*(?:\*\*)?\s*", re.IGNORECASE)
_NO_INPUT = re.compile(r"^\W*(?:none|no(?:\s+input)?(?:\s+is)?(?:\s+(?:needed|required))?|n/?a)\W*$", re.IGNORECASE)
_QUESTION = re.compile(
    r"(?:\*\*)?question\s*:(?:\*\*)?\s*(?P<question>.+?)\s*\n\s*(?:\*\*)?answer\s*:(?:\*\*)?\s*(?P<answer>.+)",
    re.IGNORECASE | re.DOTALL,
)
NO_INPUT = "none"


@dataclass(frozen=True)
class Task:
    """An instruction with an example of its input and of the response to both."""

    id: str
    instruction: str
    input: str = ""
    response: str = ""

    @property
    def prompt(self) -> str:
        """What a person would write: the instruction, and the input below it."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


def ask_for_tasks(examples: Sequence[str], number: int) -> Turns:
    """Ask for new tasks after examples."""
    shown = "\n".join(f"{place}. {_one_line(example)}" for place, example in enumerate(examples, start=1))
    first, last = len(examples) + 1, len(examples) + number
    asked = (
        "Here is a list of different tasks that people give to an assistant that reads and writes text.\n\n"
        f"{shown}\n\n"
        f"Continue the list with tasks {first} to {last}. Each new task is of another kind than all before it, in "
        "other words, and can be done by reading and writing alone. Write one task a line, with its number. Write no "
        "answers."
    )
    return ({"role": "user", "content": asked},)


def read_tasks(answer: str, *, is_cut: bool) -> tuple[list[str], int]:
    """Return the tasks of an answer, and how many were cut off: the last one of an answer that reached its limit."""
    tasks: list[str] = []
    for line in answer.splitlines():
        if found := _ITEM.match(line):
            tasks.append(found[1])
        elif tasks and line.strip() and not line.lstrip().startswith(("#", "```")):
            tasks[-1] = f"{tasks[-1]} {line.strip()}"  # a task that goes over several lines
    cut = 1 if is_cut and tasks else 0
    kept = tasks[: len(tasks) - cut]
    return [text for task in kept if (text := _LABEL.sub("", task).strip().strip('"').strip())], cut


def ask_for_input(instruction: str, examples: Sequence[Task]) -> Turns:
    """Ask for an input, after examples of tasks with and without."""
    turns: list[dict[str, str]] = []
    for example in examples:
        turns += [
            {"role": "user", "content": _input_question(example.instruction)},
            {"role": "assistant", "content": example.input or NO_INPUT},
        ]
    return (*turns, {"role": "user", "content": _input_question(instruction)})


def _input_question(instruction: str) -> str:
    return (
        f"Task: {instruction}\n\nSome tasks need an input, such as a text to work on. If this one does, write one "
        f"example of its input and nothing else. If it does not, write: {NO_INPUT}"
    )


def read_input(answer: str) -> str:
    """Return the input, empty for a task without."""
    text = _INPUT_LABEL.sub("", answer.strip()).strip()
    return "" if not text or _NO_INPUT.match(text) else text


def ask_for_response(prompt: str, system: str = "") -> Turns:
    """Ask as a person would."""
    before = ({"role": "system", "content": system},) if system else ()
    return (*before, {"role": "user", "content": prompt})


def ask_about(passage: str, earlier: Sequence[str] = ()) -> Turns:
    """Ask for a question that a passage answers, and its answer."""
    others = "".join(f"\n- {_one_line(question)}" for question in earlier)
    asked = (
        f"Text:\n{passage}\n\nWrite one question that this text answers, and the answer in whole sentences. Use only "
        "what the text says. A reader of the question does not know which text it is about."
        + (f" Ask about something else than these questions:{others}" if others else "")
        + "\n\nWrite it as:\nQuestion: ...\nAnswer: ..."
    )
    return ({"role": "user", "content": asked},)


def read_question(answer: str) -> Task | None:
    """Return question and answer; None where the answer has another form."""
    found = _QUESTION.search(answer)
    if found is None:
        return None
    question = _one_line(found["question"]).strip('"').strip()
    said = re.split(r"\n\s*(?:\*\*)?question\s*:", found["answer"], maxsplit=1, flags=re.IGNORECASE)[0].strip()
    return Task("", question, response=said) if question and said else None


def grounded_prompt(passage: str, question: str) -> str:
    """A prompt that brings the text along."""
    return f"{question}\n\n{passage}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
