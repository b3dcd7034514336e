"""Opens the generator that a stage writes with: an endpoint, or the first given model of several roles."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from stages.config.endpoints import EndpointConfig
from stages.config.errors import ConfigError
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.job.context import StageContext, naming
from stages.job.devices import local_device
from stages.models.build import load_with_own_tokenizer, positions_of
from stages.models.endpoint.client import ChatClient
from stages.models.endpoint.journal import Journal
from stages.models.generators import Generator, Kept, ModelGenerator
from stages.models.given_tokenizer import given_tokenizer

_UNLIMITED = 1 << 20


@contextmanager
def opened_generator(
    context: StageContext,
    endpoint: EndpointConfig,
    *,
    field: str,
    roles: Sequence[str],
    seed: int,
    beat: Callable[[], None] = lambda: None,
) -> Iterator[Generator]:
    """Open the endpoint if its settings name one, else the model of the first of `roles` that the stage reads.

    `field` is the path of the endpoint's settings, for errors. Answers are kept in the store: those of an endpoint for
    every later run, those of a model until the artifact is published.
    """
    if endpoint.endpoint:
        journal = Journal(context.store, endpoint, artifact=context.fingerprint)
        with ChatClient(endpoint, field=field, journal=journal, beat=beat) as client:
            yield client
        return
    role = next((role for role in roles if context.has_given(role)), None)
    if role is None:
        raise ConfigError(
            f"{field}.endpoint is empty, and the stage reads no model as {' or '.join(roles)}",
            advice="Give one of these models, or an endpoint.",
        )
    torch.set_num_threads(max(1, int(context.execution.cpus_per_worker)))
    model = _model(context, role, seed=seed, beat=beat)
    folder = f"checkpoints/{context.fingerprint}/answers-{role}"
    yield Kept(model, context.store, folder, check_lease=context.check_lease)


def _model(context: StageContext, role: str, *, seed: int, beat: Callable[[], None]) -> ModelGenerator:
    folder = context.given_dir(role)
    with naming(role):
        tokenizer = given_tokenizer(folder)
        model = load_with_own_tokenizer(folder, tokenizer).eval()
    device = local_device()
    torch.nn.Module.to(model, device)  # transformers types its own `to` by keywords only
    address = next((source.uri for source in context.sources if source.role == role), "")
    return ModelGenerator(
        model,
        tokenizer,
        name=address or f"{context.inputs[role].kind} {context.inputs[role].fingerprint[:12]}",
        content=context.content_of(role),
        device=device,
        context_length=positions_of(model) or _UNLIMITED,
        eos_id=_end_of_a_turn(tokenizer),
        seed=seed,
        batch_size=context.execution.micro_batch_size,
        beat=beat,
    )


def _end_of_a_turn(tokenizer: LoadedTokenizer) -> int:
    """What ends an answer; a template that marks no turns leaves the end of a text."""
    try:
        return tokenizer.chat().check()
    except ConfigError:
        return tokenizer.eos_id
