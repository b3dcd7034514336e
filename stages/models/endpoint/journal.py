"""Answers that are kept in the store, so that nothing is asked twice: not after a kill, not by a later run.

`answers/<address and model>/<request>.<artifact>.<prompt tokens>.<answer tokens>.json` is one answer, written before
anybody sees it. Its name says which artifact paid for it and what it cost, so one listing tells what there is and what
was spent. A name that ends in `.lost-<random>` is an attempt that may have cost as much and brought no answer. What was
under way when a process was killed is in no record: as many requests as the concurrency at most.
"""

import hashlib
import json
import logging
import re
import uuid
from dataclasses import replace

from stages.artifacts.store import Store
from stages.config.endpoints import EndpointConfig
from stages.models.endpoint.budget import Spent
from stages.models.endpoint.records import Completion, Usage

logger = logging.getLogger(__name__)

ROOM = "answers"
_NAME = re.compile(r"([0-9a-f]{64})\.([0-9a-z]+)\.(\d{1,12})\.(\d{1,12})\.(json|lost-[0-9a-f]+)")


class Journal:
    """The answers of one endpoint. `artifact` is the fingerprint of what is being built."""

    def __init__(self, store: Store, config: EndpointConfig, *, artifact: str) -> None:
        known = json.dumps([config.endpoint.rstrip("/"), config.model])
        self._store, self._artifact = store, artifact[:16]
        self._folder = f"{ROOM}/{hashlib.sha256(known.encode()).hexdigest()[:32]}"
        self._keys: dict[str, str] = {}
        self.spent = Spent()
        """What earlier attempts at this artifact cost."""
        for key in store.list(self._folder):
            if not (found := _NAME.fullmatch(key.rpartition("/")[2])):
                continue
            digest, artifact_, prompt, answer, what = found.groups()
            if what == "json":
                self._keys[digest] = key
            if artifact_ == self._artifact:
                self.spent += Usage(int(prompt), int(answer))
                self.spent = replace(self.spent, requests=self.spent.requests + 1)

    def read(self, digest: str) -> Completion | None:
        """Return the answer to a request; None where there is none that can be used."""
        if (key := self._keys.get(digest)) is None:
            return None
        try:
            return Completion.from_json(json.loads(self._store.read_bytes(key)))
        except FileNotFoundError:  # garbage collection
            return None
        except ValueError as error:
            logger.warning("%s/%s is not used, and asked again: %s", self._store.root_uri, key, error)
            return None

    def write(self, digest: str, completion: Completion) -> None:
        """Keep an answer. A process that lost its lease may write, too: it is the same answer to the same question."""
        key = self._key(digest, completion.usage, "json")
        self._store.write_bytes(key, json.dumps(completion.to_json(), ensure_ascii=False).encode())
        self._keys[digest] = key

    def write_lost(self, digest: str, usage: Usage) -> None:
        """Keep what an attempt without an answer may have cost."""
        self._store.write_bytes(self._key(digest, usage, f"lost-{uuid.uuid4().hex[:12]}"), b"")

    def _key(self, digest: str, usage: Usage, what: str) -> str:
        return f"{self._folder}/{digest}.{self._artifact}.{usage.prompt_tokens}.{usage.answer_tokens}.{what}"
