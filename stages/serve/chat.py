"""`python -m stages.serve.chat`: a conversation with one model in the terminal, in this process and without a server.

Ctrl-c ends the answer and not the chat; what was written so far stays part of the conversation.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TextIO

from stages.config.errors import ConfigError, StageError
from stages.config.text import compact, printable
from stages.serve.address import Address, parse_addresses

if TYPE_CHECKING:
    from stages.serve.asking import Prompt
    from stages.serve.engine import Worker

_HELP = """/reset               forget the conversation; the system message stays
/system TEXT         set the system message and begin anew; without TEXT there is none
/temperature NUMBER  0 is always the most probable word; 1 is as the model was trained
/length NUMBER       tokens of an answer at most
/seed NUMBER         the same seed and conversation give the same answer; without NUMBER a new one each time
/help                this list
/exit                leave, as ctrl-d does
ctrl-c               end the answer, or clear the line"""
_EXAMPLES = """examples:
  python -m stages.serve.chat models:/athanor-aligned@champion
  python -m stages.serve.chat ./my-model --temperature 0.7 --system 'Answer in one sentence.'
"""


@dataclass(frozen=True)
class Settings:
    """How answers are chosen; commands change them. Raises ConfigError for what no model can do."""

    temperature: float = 1.0
    top_p: float = 1.0
    length: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature={self.temperature}; allowed: 0 to 2", advice="Give such a number.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}; allowed: above 0, up to 1", advice="Give such a number.")
        if self.length < 1:
            raise ConfigError(f"length={self.length}; allowed: at least 1 token", advice="Give such a number.")


@dataclass
class Conversation:
    """What was said so far."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]


class Chat:
    """One model, one conversation, and the terminal."""

    def __init__(self, worker: "Worker", settings: Settings, *, system: str = "", out: TextIO = sys.stdout) -> None:
        self._worker, self._served, self._out = worker, worker.served, out
        self.settings, self.talk = settings, Conversation(system)
        self._reason: str | None = None

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False when the chat is over. Raises ConfigError for no command."""
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        match name:
            case "exit" | "quit":
                return False
            case "help":
                self._say(_HELP)
            case "reset":
                self.talk.turns.clear()
                self._say("the conversation begins anew")
            case "system":
                self.talk = Conversation(value)
                self._say("system message set; the conversation begins anew" if value else "no system message any more")
            case "temperature":
                self.settings = replace(self.settings, temperature=_number(value, name))
                self._say(f"temperature {self.settings.temperature:g}")
            case "length":
                self.settings = replace(self.settings, length=_whole(value, name))
                self._say(f"answers have at most {self.settings.length} tokens")
            case "seed":
                self.settings = replace(self.settings, seed=_whole(value, name) if value else None)
                self._say(f"seed {self.settings.seed}" if value else "every answer is a new one")
            case _:
                raise ConfigError(f"/{name} is no command", advice="/help lists them.")
        return True

    def ask(self, question: str) -> None:
        """Write the model's answer as it comes; it and the question become part of the conversation, also when the
        answer is interrupted. Raises ConfigError when there is no room, and leaves the conversation as it was."""
        from stages.serve.asking import chat_prompt, room
        from stages.serve.protocol import RequestError

        messages = [*self.talk.messages(), {"role": "user", "content": question}]
        try:
            prompt = chat_prompt(self._served, messages)
        except RequestError as error:
            advice = "/reset begins anew, /system without text drops the system message."
            raise ConfigError(error.message, advice=advice) from error
        left = room(self._served, prompt)
        if left < 1:
            raise ConfigError(
                f"the context is full: the conversation has {len(prompt.ids)} tokens with this question, and "
                f"{self._served.name} reads and writes at most {self._served.context_length}",
                advice="/reset begins anew; the question was not asked.",
            )
        length = min(left, self.settings.length)
        texts: list[str] = []
        ended = ""
        try:
            for text in self._pieces(prompt, length):
                texts.append(text)
                self._out.write(printable(text))
                self._out.flush()
        except KeyboardInterrupt:
            ended = "interrupted"
        else:
            if self._reason == "length":
                ended = (
                    f"cut at {length} tokens: the context of {self._served.context_length} is full; /reset begins anew"
                    if length == left
                    else f"cut at {length} tokens; /length allows more"
                )
        self._out.write("\n")
        if ended:
            self._say(ended)
        self.talk.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": "".join(texts)}]

    def _pieces(self, prompt: "Prompt", length: int) -> Iterator[str]:
        from stages.serve.answer import Answer, Choice, Piece

        arrived: list[Piece] = []
        choice = Choice(
            max_tokens=length,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            stops=self._served.chat_stops,
            end_ids=self._served.end_ids,
            seed=self.settings.seed,
        )
        answer = Answer(prompt.ids, choice, emit=arrived.append, tokenizer=self._served.tokenizer.backend)
        self._worker.add([answer])
        try:
            while not answer.is_done:
                self._worker.turn()
                for piece in arrived:
                    if piece.error:
                        raise ConfigError(piece.error, advice="The log above says more; /reset begins anew.")
                    self._reason = piece.finish_reason
                    yield piece.text
                arrived.clear()
        finally:
            # ctrl-c may come in the middle of a step: nothing of this answer is used again
            self._worker.drop_all()

    def _say(self, text: str) -> None:
        self._out.write(printable(f"({text})\n" if "\n" not in text else f"{text}\n"))
        self._out.flush()


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"/{name} {text!r} is no number", advice=f"Write /{name} NUMBER.") from None


def _whole(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"/{name} {text!r} is no whole number", advice=f"Write /{name} NUMBER.") from None


def talk(chat: Chat, lines: Iterator[str], out: TextIO) -> None:
    """Answer lines until there are no more; what cannot be done is said, and the chat continues."""
    for line in lines:
        text = line.strip()
        if not text:
            continue
        try:
            if not text.startswith("/"):
                chat.ask(text)
            elif not chat.command(text):
                return
        except ConfigError as error:
            out.write(printable(f"({error.message} {error.advice})\n"))
            out.flush()


def typed_lines(out: TextIO) -> Iterator[str]:
    """Lines as they are typed, with editing and history; ctrl-c clears a line, ctrl-d ends."""
    import readline  # noqa: F401 - input() edits lines when it is there

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            out.write("\n(ctrl-d or /exit leaves)\n")
        except EOFError:
            out.write("\n")
            return


@contextlib.contextmanager
def loaded_worker(address: Address, options: argparse.Namespace) -> Iterator["Worker"]:
    """The model, ready to answer."""
    from stages.job.scratch import scratch_folder
    from stages.serve.devices import serving_device, serving_dtype, use_threads
    from stages.serve.engine import Worker
    from stages.serve.loading import load_model, model_files

    device = serving_device()
    dtype = serving_dtype(options.dtype, device)
    with scratch_folder() as scratch:
        files = model_files(address, scratch.parent / "cache")
        served = load_model(address, files, device=device, dtype=dtype, context_length=options.context)
        use_threads(sum(weight.numel() for weight in served.model.parameters()))
        yield Worker(served, max_batch=1)


def _about(worker: "Worker") -> str:
    served = worker.served
    size = compact(sum(weight.numel() for weight in served.model.parameters()))
    plain = "" if served.has_own_template else "; it has no chat template, so it continues `User:` and `Assistant:`"
    return f"{served.name}: {size} parameters, context of {served.context_length} tokens{plain}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stages.serve.chat",
        description="Talk to a model in the terminal.",
        epilog=f"{_EXAMPLES}\ncommands:\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        help="models:/name@alias, models:/name/version, an artifact, a Hugging Face folder or hub id, a GGUF file",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is always the most probable word; default 1")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="only the most probable words of this share; default 1"
    )
    parser.add_argument("--length", type=int, default=256, metavar="TOKENS", help="of an answer at most; default 256")
    parser.add_argument("--seed", type=int, default=None, help="the same seed and conversation give the same answer")
    parser.add_argument("--dtype", default="auto", help="format of the weights: auto, float32, bfloat16, float16")
    parser.add_argument("--context", type=int, default=0, metavar="TOKENS", help="limit the conversation to so many")
    return parser


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        settings = Settings(options.temperature, options.top_p, options.length, options.seed)
        (address,) = parse_addresses([options.model])
        with loaded_worker(address, options) as worker:
            chat = Chat(worker, settings, system=options.system)
            if sys.stdin.isatty():
                sys.stdout.write(printable(f"{_about(worker)}\n/help lists commands, ctrl-d leaves\n\n"))
                talk(chat, typed_lines(sys.stdout), sys.stdout)
            else:
                talk(chat, iter(sys.stdin), sys.stdout)
    except StageError as error:
        sys.stderr.write(printable(f"error: {error.message}\n{error.advice}\n"))
        return 2
    except OSError as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
