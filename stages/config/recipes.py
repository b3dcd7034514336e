"""Recipes: functions that return a complete configuration. Add one by adding a function and its name to RECIPES."""

from collections.abc import Callable

from stages.config.closing import EvaluateConfig, Guard, PromoteConfig
from stages.config.curate import CurateConfig
from stages.config.execution import Engine, ExecutionConfig
from stages.config.forms import GoldScorer
from stages.config.gates import GatesConfig
from stages.config.pipeline import Executions, PipelineConfig
from stages.config.preferences import DPOConfig, GoldConfig, RewardConfig
from stages.config.rollouts import PPOConfig
from stages.config.tokens import TokenizeConfig
from stages.config.train import Algorithm, LoRAConfig, ModelConfig, OptimizerConfig, PretrainConfig, Schedule, SFTConfig

_DEMO_PACKAGES = (
    "apache-airflow-core",
    "datasets",
    "huggingface-hub",
    "networkx",
    "numpy",
    "pandas",
    "torch",
)


def demo(*, seed: int = 0) -> PipelineConfig:
    """Under three million parameters from the documentation of the installed packages, on two CPU cores in minutes."""
    train = ExecutionConfig(micro_batch_size=16, checkpoint_every=20, cpus_per_worker=2)
    # To models of this size a second core is worth little: two stages side by side, on one core each, end sooner.
    beside = train.model_copy(update={"cpus_per_worker": 1})
    return PipelineConfig(
        recipe="demo",
        run_name="demo",
        gold_scorer=GoldScorer.TRAIN,
        curate=CurateConfig(
            packages=_DEMO_PACKAGES,
            heldout_packages=("datasets", "networkx"),
            include_stdlib=True,
            max_bytes=4_000_000,
            max_instructions=3_000,
            max_preferences=2_000,
            seed=seed,
        ),
        tokenize=TokenizeConfig(vocab_size=2048, sequence_length=256, max_prompt_length=96),
        pretrain=PretrainConfig(
            model=ModelConfig(hidden_size=192, intermediate_size=512, num_layers=4, num_heads=3, num_kv_heads=3),
            max_tokens=260_000,
            global_batch_size=16,
            optimizer=OptimizerConfig(
                algorithm=Algorithm.MUON, learning_rate=8e-3, weight_decay=0.1, warmup_fraction=0.05
            ),
            seed=seed,
        ),
        sft=SFTConfig(
            num_epochs=1,
            global_batch_size=16,
            optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate_ratio=0.05),
            seed=seed,
        ),
        reward=RewardConfig(
            num_epochs=1.5,
            global_batch_size=32,
            optimizer=OptimizerConfig(learning_rate=8e-4),
            eval_items=256,
            seed=seed,
        ),
        gold=GoldConfig(
            num_epochs=1.5,
            global_batch_size=32,
            optimizer=OptimizerConfig(learning_rate=8e-4),
            eval_items=256,
            seed=seed + 1,
        ),
        ppo=PPOConfig(
            num_rollouts=16,
            rollout_size=64,
            global_batch_size=32,
            num_epochs=2,
            max_response_length=40,
            kl_coefficient=0.03,
            optimizer=OptimizerConfig(learning_rate=3e-4, schedule=Schedule.LINEAR, min_learning_rate_ratio=0.2),
            eval_every=16,  # four of its 64 steps, for the figure of proxy and gold
            seed=seed,
        ),
        dpo=DPOConfig(
            num_epochs=0.75,
            global_batch_size=32,
            optimizer=OptimizerConfig(learning_rate=3e-4),
            eval_items=256,
            seed=seed,
        ),
        evaluate=EvaluateConfig(
            max_documents_tokens=40_000,
            max_documents=96,
            max_preferences=400,
            max_response_length=40,
            # Easy enough for a model of this size, see docs/BENCHMARKS.md.
            benchmarks=("heldout-continuation#limit=96", "heldout-question#limit=96"),
        ),
        promote=PromoteConfig(
            primary=("gold", "judge", "pairs"),
            guards=(Guard(suite="language", margin=0.25),),
            level=0.05,
            power=0.9,
            least_difference=0.05,
        ),
        gates=GatesConfig(max_pairs=256),
        execution=Executions(
            curate=ExecutionConfig(cpus_per_worker=2),
            pretrain=train,
            sft=train,
            reward=beside,
            gold=beside,
            ppo=train,
            dpo=beside,
            evaluate=ExecutionConfig(cpus_per_worker=2),
        ),
    )


def smollm(*, seed: int = 0) -> PipelineConfig:
    """SmolLM2-135M-Instruct learns by adapters to answer about software in one sentence, on two CPU cores in twenty
    minutes."""
    train = ExecutionConfig(micro_batch_size=4, checkpoint_every=10, cpus_per_worker=2)
    adapter = LoRAConfig(rank=16, alpha=32.0)
    return PipelineConfig(
        recipe="smollm",
        run_name="smollm",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        curate=CurateConfig(
            packages=_DEMO_PACKAGES,
            heldout_packages=("datasets", "networkx"),
            include_stdlib=True,
            max_bytes=2_000_000,
            max_instructions=400,
            max_preferences=128,
            max_heldout_pairs=200,
            # The words of a summary in disorder are a mistake that this model does not make; the others teach more.
            preference_mix=(0.3, 0.3, 0.3, 0.1),
            seed=seed,
        ),
        tokenize=TokenizeConfig(sequence_length=256, max_prompt_length=96),
        # Only with continue_pretraining; a base model brings its own size.
        pretrain=PretrainConfig(
            max_tokens=16_384,
            global_batch_size=8,
            optimizer=OptimizerConfig(learning_rate=2e-5),
            eval_items=8,
            seed=seed,
        ),
        sft=SFTConfig(
            lora=adapter,
            num_epochs=1,
            global_batch_size=8,
            optimizer=OptimizerConfig(learning_rate=4e-4, warmup_fraction=0.1),
            eval_items=16,
            seed=seed,
        ),
        reward=RewardConfig(
            lora=adapter,
            num_epochs=1,
            global_batch_size=16,
            optimizer=OptimizerConfig(learning_rate=4e-4, warmup_fraction=0.1),
            eval_items=64,
            seed=seed,
        ),
        gold=GoldConfig(
            lora=adapter,
            num_epochs=1,
            global_batch_size=16,
            optimizer=OptimizerConfig(learning_rate=4e-4, warmup_fraction=0.1),
            eval_items=64,
            seed=seed + 1,
        ),
        ppo=PPOConfig(
            lora=adapter,
            num_rollouts=2,
            rollout_size=32,
            global_batch_size=16,
            num_epochs=2,
            max_response_length=32,
            optimizer=OptimizerConfig(learning_rate=1e-4, schedule=Schedule.LINEAR, min_learning_rate_ratio=0.2),
            eval_items=16,
            seed=seed,
        ),
        dpo=DPOConfig(
            lora=adapter,
            num_epochs=1,
            global_batch_size=16,
            optimizer=OptimizerConfig(learning_rate=1e-4, warmup_fraction=0.1),
            eval_items=64,
            seed=seed,
        ),
        evaluate=EvaluateConfig(
            max_documents_tokens=4_096,
            max_documents=24,
            max_instructions=32,
            max_preferences=32,
            max_prompts=16,
            num_samples=8,
            max_response_length=40,
            # Every stage may change what a model declines.
            benchmarks=("refusals",),
        ),
        promote=PromoteConfig(
            primary=("gold", "judge", "pairs"),
            guards=(Guard(suite="language", margin=0.25),),
            level=0.05,
            power=0.9,
            least_difference=0.05,
        ),
        gates=GatesConfig(max_pairs=64),
        execution=Executions(
            curate=ExecutionConfig(cpus_per_worker=2),
            tokenize=ExecutionConfig(cpus_per_worker=2),
            pretrain=train,
            sft=train,
            reward=train,
            gold=train,
            ppo=train,
            dpo=train,
            evaluate=ExecutionConfig(cpus_per_worker=2),
        ),
    )


def tiny(*, seed: int = 0) -> PipelineConfig:
    """Every stage in seconds, for tests: proves that the machinery works, teaches a model nothing."""
    train = ExecutionConfig(micro_batch_size=4, checkpoint_every=4)
    optimizer = OptimizerConfig(learning_rate=1e-3)
    return PipelineConfig(
        recipe="tiny",
        run_name="tiny",
        curate=CurateConfig(packages=("click", "jinja2", "rich"), heldout_packages=("click",), planted=2, seed=seed),
        tokenize=TokenizeConfig(vocab_size=512, sequence_length=128, bpe_train_bytes=200_000, max_prompt_length=64),
        pretrain=PretrainConfig(
            model=ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1),
            max_tokens=8_192,
            global_batch_size=4,
            optimizer=optimizer,
            eval_items=8,
            seed=seed,
        ),
        sft=SFTConfig(num_epochs=0.5, global_batch_size=4, optimizer=optimizer, eval_items=8, seed=seed),
        reward=RewardConfig(num_epochs=0.5, global_batch_size=8, optimizer=optimizer, eval_items=16, seed=seed),
        gold=GoldConfig(num_epochs=0.5, global_batch_size=8, optimizer=optimizer, eval_items=16, seed=seed + 1),
        ppo=PPOConfig(
            num_rollouts=2,
            rollout_size=8,
            global_batch_size=4,
            max_response_length=8,
            optimizer=optimizer,
            eval_items=8,
            seed=seed,
        ),
        dpo=DPOConfig(num_epochs=0.5, global_batch_size=8, optimizer=optimizer, eval_items=16, seed=seed),
        evaluate=EvaluateConfig(
            max_documents_tokens=4096,
            max_documents=16,
            max_instructions=16,
            max_preferences=32,
            max_prompts=8,
            num_samples=2,
            max_response_length=8,
        ),
        # Eight items tell nothing about models that have learnt nothing; here, that the comparison is made.
        promote=PromoteConfig(
            primary=("pairs",), guards=(Guard(suite="language", margin=1.0),), level=0.05, power=0.9, min_items=4
        ),
        # What it trains knows nothing, so a reward model is not asked for more than chance.
        gates=GatesConfig(bounds=("curate: curate/documents_kept >= 1",), max_pairs=64),
        execution=Executions(pretrain=train, sft=train, reward=train, gold=train, ppo=train, dpo=train),
    )


def llama_1b(*, seed: int = 0) -> PipelineConfig:
    """A Llama-style model of a billion parameters on eight GPUs; bring your own documents."""
    train = ExecutionConfig(
        num_workers=8,
        cpus_per_worker=8,
        gpus_per_worker=1,
        entrypoint_cpus=1,
        engine=Engine.FSDP,
        micro_batch_size=4,
        gradient_checkpointing=True,
        compile=True,
        checkpoint_every=500,
        log_every=10,
        max_retries=5,
    )
    post = train.model_copy(update={"micro_batch_size": 2, "checkpoint_every": 100})
    seldom = 6 * 3600  # these stages report progress once per shard or model, not once per step
    generation = ExecutionConfig(
        num_workers=1, cpus_per_worker=8, gpus_per_worker=1, entrypoint_cpus=1, stall_seconds=seldom
    )
    return PipelineConfig(
        recipe="llama_1b",
        run_name="llama-1b",
        curate=CurateConfig(profile="web", word_splitter="spacy", planted=0, seed=seed),
        tokenize=TokenizeConfig(
            vocab_size=32_768, sequence_length=4096, bpe_train_bytes=2_000_000_000, max_prompt_length=2048
        ),
        pretrain=PretrainConfig(
            model=ModelConfig(
                hidden_size=2048,
                intermediate_size=8192,
                num_layers=16,
                num_heads=32,
                num_kv_heads=8,
                rope_theta=500_000.0,
            ),
            max_tokens=25_000_000_000,
            global_batch_size=256,
            optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.1, warmup_fraction=0.01),
            eval_every=1000,
            eval_items=512,
            seed=seed,
        ),
        sft=SFTConfig(
            num_epochs=2, global_batch_size=64, optimizer=OptimizerConfig(learning_rate=2e-5), eval_every=200, seed=seed
        ),
        reward=RewardConfig(
            num_epochs=1,
            global_batch_size=128,
            optimizer=OptimizerConfig(learning_rate=1e-5),
            eval_every=200,
            seed=seed,
        ),
        gold=GoldConfig(
            num_epochs=1,
            global_batch_size=128,
            optimizer=OptimizerConfig(learning_rate=1e-5),
            eval_every=200,
            seed=seed + 1,
        ),
        ppo=PPOConfig(
            num_rollouts=1000,
            rollout_size=512,
            global_batch_size=128,
            num_epochs=2,
            max_response_length=512,
            kl_target=6.0,
            optimizer=OptimizerConfig(learning_rate=1e-6, schedule=Schedule.CONSTANT),
            eval_every=100,
            seed=seed,
        ),
        dpo=DPOConfig(
            num_epochs=1,
            global_batch_size=128,
            optimizer=OptimizerConfig(learning_rate=5e-7),
            eval_every=100,
            seed=seed,
        ),
        evaluate=EvaluateConfig(
            max_documents_tokens=2_000_000,
            max_documents=1000,
            max_instructions=2000,
            max_preferences=2000,
            max_prompts=512,
            max_response_length=512,
            benchmarks=("heldout-continuation", "heldout-question", "refusals", "toxicity"),
        ),
        promote=PromoteConfig(
            primary=("gold", "judge", "pairs"),
            guards=(Guard(suite="language", margin=0.05), Guard(suite="responses", margin=0.05)),
            level=0.05,
            power=0.9,
            least_difference=0.02,
        ),
        execution=Executions(
            curate=ExecutionConfig(entrypoint_cpus=16, cpus_per_worker=16, stall_seconds=seldom),
            tokenize=ExecutionConfig(entrypoint_cpus=16, cpus_per_worker=16, stall_seconds=seldom),
            pretrain=train,
            sft=post,
            reward=post,
            gold=post,
            ppo=post,
            dpo=post,
            evaluate=generation,
            respond=generation,
        ),
    )


RECIPES: dict[str, Callable[..., PipelineConfig]] = {
    "demo": demo,
    "smollm": smollm,
    "tiny": tiny,
    "llama_1b": llama_1b,
}
