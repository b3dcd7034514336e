"""What a stage will take: parameters, tokens, FLOPs, memory, time, money. Pure arithmetic that a reader can redo.

Three kinds of numbers meet here and are never mixed up: those that follow from the configuration, those that were
counted or measured in an earlier build (preferred), and assumptions. `Estimate.basis` says which were used.
"""

from pydantic import Field

from stages.config.base import Config
from stages.config.execution import Engine, ExecutionConfig
from stages.config.graph import BASE_MODEL, GOLD_MODEL, GRAPH, JUDGE, REWARD_MODEL, Stage
from stages.config.pipeline import PipelineConfig
from stages.config.preference_losses import KTOLoss
from stages.config.preferences import DPOConfig, PairsConfig, PairsHalf, RewardConfig
from stages.config.scorers import reads_reward_model
from stages.config.text import compact
from stages.config.train import LoRAConfig, ModelConfig, PostTrainConfig, PretrainConfig, SampledConfig, TrainConfig

ASSUMED_CONVERSATION_TOKENS = 256
_FLOAT32, _BFLOAT16 = 4, 2
_LOGITS_CHUNK = 1024
"""Most targets whose logits exist at once (stages/models/linear_cross_entropy.py)."""


class Devices(Config):
    """What one device does and costs. The defaults are cautious; measured builds replace them as soon as there are
    any."""

    gpu_flops: float = Field(default=150e12, gt=0)
    """Sustained FLOP/s of a GPU in bf16: about half of an A100's 312e12 (an H100 reaches two to three times that)."""
    gpu_float32_share: float = Field(default=1 / 16, gt=0, le=1)
    """Share of it in float32: 19.5 of an A100's 312 TFLOP/s."""
    cpu_core_flops: float = Field(default=60e9, gt=0)
    """Sustained FLOP/s of a CPU core: the demo's pretraining, compiled, on two cores of a shared server."""
    gpu_hour_price: float | None = Field(default=None, ge=0)
    """Price of a GPU for an hour; without it no cost is shown for GPUs."""
    cpu_hour_price: float | None = Field(default=None, ge=0)
    """Price of a CPU core for an hour."""


class DataCounts(Config):
    """How much there is to train on after `tokenize`."""

    conversations: int
    """Training conversations."""
    conversation_tokens: float
    """Tokens of a conversation, on average; also taken for each side of a pair."""
    preferences: int
    """Training pairs."""
    unpaired: int = 0
    """Training responses with a label of their own, which only the loss `kto` trains on."""
    vocab_size: int
    """Entries of the vocabulary."""
    basis: str
    """Where the numbers come from."""


class Workload(Config):
    """Tokens that pass through models, each pass counted."""

    trained_tokens: float
    """Forward and backward."""
    forward_tokens: float = 0.0
    """Forward only: frozen models, generation, evaluation."""

    @property
    def passes(self) -> float:
        """Forward passes' worth of work: a backward pass costs two."""
        return 3 * self.trained_tokens + self.forward_tokens


class Measured(Config):
    """An earlier build of the same stage, as far as time depends on it."""

    fingerprint: str
    wall_seconds: float
    devices: float
    """GPUs, or CPU cores where there was no GPU."""
    on_gpu: bool
    peak_memory_bytes: int
    work: float | None
    """Parameters times forward passes of tokens; None for stages that train and generate nothing."""


class Estimate(Config):
    """None means unknown, and `basis` says why."""

    parameters: int | None = None
    tokens: float | None = None
    """Tokens trained on; for `evaluate`, tokens read and generated."""
    flops: float | None = None
    memory_bytes: float | None = None
    """Of one worker; on a GPU its device memory, without the framework's own gigabyte."""
    seconds: float | None = None
    cost: float | None = None
    """In the currency of the prices; None where they are not set."""
    basis: tuple[str, ...] = ()


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Weights of the decoder: embeddings, attention, SwiGLU (all experts and their router), norms."""
    embeddings = vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return embeddings + model.num_layers * _layer_parameters(model) + model.hidden_size


def active_parameters(model: ModelConfig, vocab_size: int) -> int:
    """The weights that one token passes through: of the experts, only its own."""
    if not model.num_experts:
        return count_parameters(model, vocab_size)
    asleep = (model.num_experts - model.num_experts_per_token) * 3 * model.hidden_size * model.intermediate_size
    return count_parameters(model, vocab_size) - model.num_layers * asleep


def _layer_parameters(model: ModelConfig) -> int:
    hidden, kv_size = model.hidden_size, model.hidden_size // model.num_heads * model.num_kv_heads
    attention = 2 * hidden * hidden + 2 * hidden * kv_size
    router = hidden * model.num_experts
    return attention + max(model.num_experts, 1) * 3 * hidden * model.intermediate_size + router + 2 * hidden


def adapter_parameters(model: ModelConfig, lora: LoRAConfig) -> int:
    """Weights of an adapter: rank x (in + out) for every linear module and every expert's matrix that gets one."""
    hidden, kv_size = model.hidden_size, model.hidden_size // model.num_heads * model.num_kv_heads
    widths = {"q_proj": 2 * hidden, "k_proj": hidden + kv_size, "v_proj": hidden + kv_size, "o_proj": 2 * hidden}
    if not model.num_experts:
        widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + model.intermediate_size)
    chosen = [width for name, width in widths.items() if {name, "all-linear"} & set(lora.target_modules)]
    if model.num_experts:
        inner = model.intermediate_size
        stacks = {"gate_up_proj": hidden + 2 * inner, "down_proj": inner + hidden}
        asked = tuple(lora.target_parameters)
        chosen += [
            model.num_experts * width
            for name, width in stacks.items()
            if "all-experts" in asked or f"mlp.experts.{name}".endswith(asked)
        ]
        chosen += [hidden + model.num_experts] if asked and "mlp.gate.weight".endswith(asked) else []
    return model.num_layers * lora.rank * sum(chosen)


def forward_flops_per_token(model: ModelConfig, vocab_size: int, sequence_length: float) -> float:
    """2 FLOPs a weight that a token meets, and 4 L H S for attention over S positions (PaLM, arXiv:2204.02311, app. B).

    The attention term ignores causal and document masks, so it is an upper bound; embedding look-ups are free.
    """
    # With untied embeddings the look-up table is a weight of its own that nothing is multiplied with.
    lookup = 0 if model.tie_embeddings else vocab_size * model.hidden_size
    multiplied = active_parameters(model, vocab_size) - lookup
    return 2 * multiplied + 4 * model.num_layers * model.hidden_size * sequence_length


def assumed_counts(config: PipelineConfig) -> DataCounts:
    """Before anything was counted: the recipe's caps and an assumed length."""
    length = min(ASSUMED_CONVERSATION_TOKENS, config.tokenize.sequence_length)
    sources = config.curate.preference_sources
    return DataCounts(
        conversations=config.curate.max_instructions if config.curate.instructions else 0,
        conversation_tokens=length,
        preferences=config.curate.max_preferences if any(not one.is_unpaired for one in sources) else 0,
        unpaired=config.curate.max_preferences if any(one.is_unpaired for one in sources) else 0,
        vocab_size=config.tokenize.vocab_size,
        basis=f"assumes curate's caps on pairs are reached, {length} tokens a conversation",
    )


def workload(
    stage: Stage, config: PipelineConfig, counts: DataCounts, *, selected: frozenset[Stage]
) -> Workload | None:
    """Tokens through models; None for stages without a model."""
    length = counts.conversation_tokens
    match stage:
        case Stage.PRETRAIN:
            row = config.tokenize.sequence_length
            return Workload(trained_tokens=max(1, config.pretrain.max_tokens // row) * row)
        case Stage.PPO:
            ppo = config.ppo
            prompt = min(config.tokenize.max_prompt_length, length)
            tokens = ppo.num_rollouts * ppo.rollout_size * (prompt + ppo.max_response_length)
            # Policy and perhaps critic are trained; each response is generated, and read by both, by the reference and
            # perhaps by a reward model.
            trained = ppo.models.trained
            read = 2 + trained + reads_reward_model(ppo.scorer)
            return Workload(trained_tokens=trained * ppo.num_epochs * tokens, forward_tokens=read * tokens)
        case Stage.EVALUATE:
            evaluate = config.evaluate
            models = sum(GRAPH[stage].trains for stage in selected) + len(config.given_roles(stage))
            # Rows for perplexity, and the beginnings of documents, which are about a row long each.
            documents = evaluate.max_documents_tokens + evaluate.max_documents * config.tokenize.sequence_length
            documents = documents if config.curate.documents or config.previous_data else 0
            # Pairs are read twice: by themselves, and relative to the start.
            read = documents + (evaluate.max_instructions + 4 * evaluate.max_preferences) * length
            answered = evaluate.max_prompts * (
                min(config.tokenize.max_prompt_length, length) + evaluate.max_response_length
            )
            # Of benchmarks from outside the number of items is not known here.
            benchmarks = sum(made.known_tokens for made in evaluate.parsed_benchmarks)
            return Workload(trained_tokens=0, forward_tokens=models * (read + 2 * answered + benchmarks))
        case _:
            return _epochs_of_data(stage, config.stage_config(stage), counts)


def _epochs_of_data(stage: Stage, train: Config, counts: DataCounts) -> Workload | None:
    """Tokens of a stage that takes its examples some times over; both responses of a pair are trained on."""
    if not isinstance(train, SampledConfig):
        return None
    examples = 2 * counts.preferences if GRAPH[stage].weighs == "preferences" else counts.conversations
    if _is_kto(train):
        examples += counts.unpaired
    if isinstance(train, PairsConfig) and train.half is not PairsHalf.BOTH:
        examples /= 2
    tokens = examples * counts.conversation_tokens
    # The policy computes the log-probabilities of its reference once, before the first epoch, for what it trains on.
    refers = isinstance(train, DPOConfig) and train.loss.needs_reference
    forward = tokens * min(1.0, train.num_epochs) if refers else 0.0
    if _is_kto(train):
        # Every example has a mismatch, about as long, which the reference reads once and the policy in every epoch.
        forward = 2 * forward + tokens * train.num_epochs
    return Workload(trained_tokens=_members(train) * tokens * train.num_epochs, forward_tokens=forward)


def _is_kto(train: Config) -> bool:
    return isinstance(train, DPOConfig) and isinstance(train.loss, KTOLoss)


def memory_bytes(
    stage: Stage,
    config: PipelineConfig,
    *,
    vocab_size: int,
    model: ModelConfig | None = None,
    parameters: int | None = None,
) -> float:
    """Memory of one worker while it trains: weights, gradients, AdamW's moments, frozen models, activations, logits.

    `model` is the shape of a given model and `parameters` its size, where it was looked at.
    """
    model, execution = model or config.pretrain.model, config.stage_execution(stage)
    num_weights = parameters or count_parameters(model, vocab_size)
    embeddings = vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    # Tensor and pipeline parallelism cut the layers; embeddings may be whole. Frozen models are whole on every worker.
    held = max(0, num_weights - embeddings) / execution.workers_per_copy + min(num_weights, embeddings)
    spec = GRAPH[stage]
    if not spec.trains:
        return _FLOAT32 * (spec.frozen_models + _num_judges(stage, config)) * num_weights
    train = config.stage_config(stage)
    assert isinstance(train, TrainConfig)
    numbers = _numbers_per_weight(execution, average=train.optimizer.ema_decay > 0)
    judges = _FLOAT32 * _num_judges(stage, config) * num_weights
    models = train.models
    others = _FLOAT32 * models.frozen * num_weights
    states = _FLOAT32 * models.trained * held * numbers
    if isinstance(train, PostTrainConfig) and train.lora.rank:
        shards = max(execution.num_workers, 1) if execution.engine is Engine.FSDP else 1
        frozen = _frozen_bytes(train.lora, held / shards)
        states = models.trained * (frozen + _FLOAT32 * numbers * adapter_parameters(model, train.lora))
    width = _BFLOAT16 if train.precision == "bf16" else _FLOAT32
    tokens = execution.micro_batch_size * config.tokenize.sequence_length
    logits = _LOGITS_CHUNK * vocab_size * (width + _FLOAT32)
    return states + others + judges + _activation_bytes(model, execution, tokens=tokens, width=width) + logits


def _num_judges(stage: Stage, config: PipelineConfig) -> int:
    """Models that only judge, which a stage holds next to those that it measures or trains, and the further members of
    the ensembles that it reads."""
    sources = set(config.stage_inputs(stage).values())
    made = sum(GRAPH[source].judges for source in sources)
    further = sum(_members(config.stage_config(source)) - 1 for source in sources)
    return made + further + sum(role in (GOLD_MODEL, JUDGE) for role in config.given_roles(stage))


def _members(train: Config) -> int:
    """How many models a stage trains one after another."""
    return train.ensemble_size if isinstance(train, RewardConfig) else 1


def _frozen_bytes(lora: LoRAConfig, num_weights: float) -> float:
    """A model that only its adapter trains, and that is its own reference.

    Four bits a weight, with their scales, are about an eighth of float32; embeddings and norms are counted with them.
    """
    return num_weights * (_FLOAT32 / 8 if lora.quantization == "nf4" else _FLOAT32)


def _numbers_per_weight(execution: ExecutionConfig, *, average: bool) -> float:
    """How many numbers one worker's device holds for a trained weight: weight, gradient, two moments (Muon has one) and
    perhaps an average, or a shard of them. ZeRO keeps a second, always sharded, copy of the weight, which is offloaded
    with the moments."""
    ranks = max(execution.num_workers, 1) // execution.workers_per_copy
    match execution.engine:
        case Engine.DDP:
            return 4 + average
        case Engine.FSDP:
            return (4 + average) / ranks
        case Engine.DEEPSPEED:
            weight = 1 / ranks if execution.zero_stage == 3 else 1
            gradient = 1 / ranks if execution.zero_stage >= 2 else 1
            return weight + gradient + (0 if execution.offload else 3 / ranks)


def _activation_bytes(model: ModelConfig, execution: ExecutionConfig, *, tokens: int, width: int) -> float:
    """What a decoder layer keeps for its backward pass, a token: norms and residuals, q k v o, and for each of its
    experts gate, up and product.

    With gradient checkpointing each layer keeps its input alone, and one layer at a time is whole.
    """
    hidden, kv_size = model.hidden_size, model.hidden_size // model.num_heads * model.num_kv_heads
    wide = 4 * model.intermediate_size * (model.num_experts_per_token if model.num_experts else 1)
    layer = tokens * (2 * hidden * _FLOAT32 + (5 * hidden + 2 * kv_size + wide) * width)
    if execution.gradient_checkpointing:
        return model.num_layers * tokens * hidden * _FLOAT32 + layer
    return model.num_layers * layer


def num_devices(execution: ExecutionConfig) -> tuple[float, bool]:
    """Return how many GPUs, or CPU cores where there are none, and whether they are GPUs."""
    workers = max(execution.num_workers, 1)
    if execution.gpus_per_worker:
        return workers * execution.gpus_per_worker, True
    return workers * execution.cpus_per_worker, False


def _unknown_models(config: PipelineConfig, stage: Stage) -> list[str]:
    """Roles of the given models on whose size a stage depends; a scorer is taken to be as large as the policy."""
    roles = [role for role in config.given_roles(stage) if role not in (REWARD_MODEL, GOLD_MODEL, JUDGE)]
    return roles or [BASE_MODEL] * bool(config.base_model)


def estimate(
    stage: Stage,
    config: PipelineConfig,
    *,
    selected: frozenset[Stage],
    counts: DataCounts,
    devices: Devices,
    measured: Measured | None = None,
    measured_parameters: int | None = None,
    given: ModelConfig | None = None,
) -> Estimate:
    """Put it together; what cannot be known stays None with its reason in `basis`. `given` is the shape of the
    given model that the stage starts from, where it was looked at."""
    execution, model = config.stage_execution(stage), given or config.pretrain.model
    number, on_gpu = num_devices(execution)
    work = workload(stage, config, counts, selected=selected)
    usable = measured if measured is not None and measured.on_gpu == on_gpu else None
    if work is None:
        return _as_before(execution, devices, usable)
    basis = [] if stage is Stage.PRETRAIN else [counts.basis]
    unknown = _unknown_models(config, stage) if given is None else []
    known = not unknown
    made = not config.base_model or measured_parameters is None
    parameters = count_parameters(model, counts.vocab_size) if known and made else measured_parameters
    if parameters is None:
        basis.append(f"size of {unknown[0]}={getattr(config, unknown[0])!r} is unknown until a stage has loaded it")
    for role in (REWARD_MODEL, GOLD_MODEL, JUDGE):
        if role in config.given_roles(stage):
            basis.append(f"takes {role} to be as large as the policy")
    tokens = work.trained_tokens or work.forward_tokens
    per_token = forward_flops_per_token(model, counts.vocab_size, _context(stage, config, counts)) if known else None
    if per_token is None and parameters is not None:
        per_token = 2.0 * parameters
    flops = None if per_token is None else per_token * work.passes
    size = parameters if config.base_model else None
    memory = memory_bytes(stage, config, vocab_size=counts.vocab_size, model=model, parameters=size) if known else None
    if usable is not None and usable.work and parameters is not None:
        rate = usable.wall_seconds * usable.devices / usable.work
        seconds = rate * parameters * work.passes / number
        basis.insert(0, f"time at the pace of build {usable.fingerprint[:12]}")
    elif flops is not None:
        share = 1.0 if getattr(config.stage_config(stage), "precision", "bf16") == "bf16" else devices.gpu_float32_share
        pace = devices.gpu_flops * share if on_gpu else devices.cpu_core_flops
        repeated = 4 / 3 if execution.gradient_checkpointing else 1.0
        seconds = flops * repeated / (pace * number)
        basis.insert(0, f"time at an assumed {pace / 1e12:.3g} TFLOP/s a {'GPU' if on_gpu else 'CPU core'}")
    else:
        seconds = None
    return Estimate(
        parameters=parameters,
        tokens=tokens,
        flops=flops,
        memory_bytes=memory,
        seconds=seconds,
        cost=cost(seconds, execution, devices),
        basis=tuple(basis),
    )


def _as_before(execution: ExecutionConfig, devices: Devices, measured: Measured | None) -> Estimate:
    if measured is None:
        return Estimate(basis=("time unknown: no earlier build to measure by",))
    return Estimate(
        memory_bytes=measured.peak_memory_bytes or None,
        seconds=measured.wall_seconds,
        cost=cost(measured.wall_seconds, execution, devices),
        basis=(f"time and memory of build {measured.fingerprint[:12]}",),
    )


def _context(stage: Stage, config: PipelineConfig, counts: DataCounts) -> float:
    """Positions that a token attends to at most."""
    return config.tokenize.sequence_length if stage is Stage.PRETRAIN else counts.conversation_tokens


def cost(seconds: float | None, execution: ExecutionConfig, devices: Devices) -> float | None:
    """Hours times devices times price; None when a device that is used has no price."""
    if seconds is None:
        return None
    workers = max(execution.num_workers, 1)
    gpus = workers * execution.gpus_per_worker
    # A GPU's price includes the cores beside it.
    cores = 0.0 if gpus else workers * execution.cpus_per_worker
    uses = ((gpus, devices.gpu_hour_price), (cores, devices.cpu_hour_price))
    if any(number and price is None for number, price in uses):
        return None
    return seconds / 3600 * sum(number * (price or 0.0) for number, price in uses)


def model_size(config: PretrainConfig, vocab_size: int) -> str:
    """`10.1 M`, as people say it, or `46.7 G, 12.9 G active`."""
    size = compact(count_parameters(config.model, vocab_size))
    return (
        f"{size}, {compact(active_parameters(config.model, vocab_size))} active" if config.model.num_experts else size
    )
