"""What every implementation must meet, whatever is optimised later (the list in the design)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.config.graph import Stage
from stages.config.preference_losses import ORPOLoss, PreferenceLoss, SimPOLoss
from stages.config.request import ArtifactRef
from stages.config.train import TrainConfig
from stages.data.tokens.packing import TokenSequence, collate, lay_out
from stages.data.tokens.views import Split, TokensArtifact
from stages.models.build import load_causal_lm, load_reward_model, new_causal_lm
from stages.models.forward import next_token_loss_sum, segment_logprobs, segment_scores, target_logprobs
from stages.models.generation import Draws, Sampling, generate
from stages.models.linear_cross_entropy import linear_cross_entropy_sum
from tests.numerics.training import run_training
from tests.small_world import CONFIGS, MODEL, make_context, prepare_of

Inputs = dict[Stage, dict[str, ArtifactRef]]


@pytest.fixture(scope="module")
def artifact(world: Path, tokens: ArtifactRef) -> TokensArtifact:
    return TokensArtifact(
        make_context(world, Stage.PRETRAIN, CONFIGS[Stage.PRETRAIN], {"tokens": tokens}).input_dir("tokens")
    )


@pytest.fixture(scope="module")
def model(artifact: TokensArtifact) -> torch.nn.Module:
    return new_causal_lm(MODEL, artifact, seed=3).eval()


def sequence(*ids: int, targets: int | None = None) -> TokenSequence:
    mask = np.ones(len(ids), dtype=np.int64)
    if targets is not None:
        mask[:-targets] = 0
    return TokenSequence(np.array(ids), mask)


def test_the_first_loss_is_ln_v(artifact: TokensArtifact, model: torch.nn.Module) -> None:
    ids = np.random.default_rng(0).integers(0, artifact.vocab_size, size=(4, 64))
    batch = collate([[sequence(*row)] for row in ids])
    loss = next_token_loss_sum(model, batch).item() / batch.num_targets
    assert loss == pytest.approx(math.log(artifact.vocab_size), abs=0.1)


def test_ten_tokens_at_one_and_six_at_three_average_to_one_and_three_quarters() -> None:
    # 17 equal rows of logits cannot be arranged by hand; two vocabularies can: loss = log(1 + (V - 1) e^-x).
    weight = torch.zeros(2, 1)
    weight[0, 0] = 1.0
    at = {loss: -math.log(math.exp(loss) - 1) for loss in (1.0, 3.0)}  # hidden h gives loss log(1 + e^-h)
    hidden = torch.tensor([[at[1.0]]] * 10 + [[at[3.0]]] * 6)
    targets = torch.zeros(16, dtype=torch.long)
    total = linear_cross_entropy_sum(hidden, weight, targets)
    parts = [linear_cross_entropy_sum(hidden[a:b], weight, targets[a:b]) for a, b in ((0, 3), (3, 12), (12, 16))]
    assert total.item() / 16 == pytest.approx(1.75)
    assert sum(part.item() for part in parts) / 16 == pytest.approx(1.75)


def test_chunked_cross_entropy_equals_the_plain_one_with_its_gradients() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2500, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (2500,))
    torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    expected = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    (2.0 * linear_cross_entropy_sum(hidden, weight, targets)).backward()
    torch.testing.assert_close(hidden.grad, 2 * expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, 2 * expected[1], rtol=1e-4, atol=1e-4)


def test_packed_equals_unpacked_token_by_token(model: torch.nn.Module) -> None:
    rng = np.random.default_rng(1)
    sequences = [sequence(*rng.integers(6, 200, size=n)) for n in (5, 17, 3, 30, 9)]
    packed = target_logprobs(model, lay_out(sequences)).logprobs_N
    alone = torch.cat([target_logprobs(model, collate([[one]])).logprobs_N for one in sequences])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_no_token_sees_another_document(model: torch.nn.Module) -> None:
    first, other, second = sequence(9, 10, 11, 12), sequence(99, 98, 97, 96), sequence(20, 21, 22, 23, 24)
    with_first = segment_logprobs(model, lay_out([first, second]))[1]
    with_other = segment_logprobs(model, lay_out([other, second]))[1]
    assert with_first.item() == pytest.approx(with_other.item(), abs=1e-6)


def test_a_batch_without_targets_costs_exactly_nothing(model: torch.nn.Module) -> None:
    nothing = TokenSequence(np.array([5, 6, 7]), np.zeros(3, dtype=np.int64))
    loss = next_token_loss_sum(model, collate([[nothing]]))
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())
    model.zero_grad()


def test_a_score_depends_neither_on_neighbours_nor_on_padding(artifact: TokensArtifact, stage_inputs: Inputs) -> None:
    folder = Path(stage_inputs[Stage.PPO]["reward"].uri.removeprefix("file://"))
    reward = load_reward_model(folder, artifact).eval()
    one, others = sequence(9, 10, 11, 1), [sequence(*range(20, 40)), sequence(50, 51, 52)]
    alone = segment_scores(reward, collate([[one]]), pad_id=artifact.pad_id)[0]
    among = segment_scores(reward, lay_out([*others, one]), pad_id=artifact.pad_id)[2]
    hugging_face = reward(input_ids=torch.tensor([[9, 10, 11, 1]])).logits[0, 0]
    padded = torch.tensor([[9, 10, 11, 1, artifact.pad_id, artifact.pad_id]])
    hugging_face_padded = reward(input_ids=padded, attention_mask=(padded != artifact.pad_id).long()).logits[0, 0]
    for value in (among, hugging_face, hugging_face_padded):
        assert value.item() == pytest.approx(alone.item(), abs=1e-5)


@pytest.mark.parametrize("stage", [Stage.REWARD, Stage.DPO], ids=str)
def test_pair_objectives_start_at_ln_2(stage: Stage, stage_inputs: Inputs, tmp_path: Path) -> None:
    config = CONFIGS[stage]
    if stage is Stage.REWARD:
        config = config.model_copy(update={"center_coefficient": 0.0})
    trained = run_training(tmp_path, stage, config, stage_inputs[stage])
    assert trained.history[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_the_first_ppo_minibatch_has_ratio_one(stage_inputs: Inputs, tmp_path: Path) -> None:
    first = run_training(tmp_path, Stage.PPO, CONFIGS[Stage.PPO], stage_inputs[Stage.PPO]).history[0]
    assert first["ppo/approx_kl"] == pytest.approx(0.0, abs=1e-7)
    assert first["ppo/clip_fraction"] == 0.0
    assert first["ppo/kl"] == pytest.approx(0.0, abs=1e-4)


def test_sampling_does_not_depend_on_the_batch(model: torch.nn.Module, artifact: TokensArtifact) -> None:
    prompts = [np.array(ids) for ids in ([0, 3, 40, 41], [0, 3, 50], [0, 3, 60, 61, 62, 63])]
    sampling = Sampling(max_response_length=8, eos_id=artifact.eos_id, pad_id=artifact.pad_id)
    together = generate(model, prompts, sampling, Draws(seed=5, stream=1, indices=[0, 1, 2]))
    alone = [generate(model, [p], sampling, Draws(seed=5, stream=1, indices=[i]))[0] for i, p in enumerate(prompts)]
    assert [r.tolist() for r in together] == [r.tolist() for r in alone]


def test_sampling_follows_the_distribution(artifact: TokensArtifact) -> None:
    """20,000 draws of one token against the softmax they come from."""
    from stages.models.generation import _choose

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = torch.from_numpy(Draws(seed=1, stream=0, indices=range(20_000)).uniforms(1)[:, 0]).float()
    drawn = _choose(logits.expand(20_000, 4), 0.5, draws)
    expected = (logits / 0.5).softmax(0)
    counts = torch.bincount(drawn.tokens_S, minlength=4) / 20_000
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(drawn.probabilities_S, expected[drawn.tokens_S])


def test_an_export_reloads_in_plain_transformers(artifact: TokensArtifact, stage_inputs: Inputs) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    ids = torch.tensor([[0, 4, 70, 71, 72, 1, 5]])
    for role, loader, ours in (
        ("model", AutoModelForCausalLM, load_causal_lm),
        ("reward", AutoModelForSequenceClassification, load_reward_model),
    ):
        folder = Path(stage_inputs[Stage.PPO][role].uri.removeprefix("file://"))
        plain = loader.from_pretrained(folder).eval()
        torch.testing.assert_close(
            plain(input_ids=ids).logits, ours(folder, artifact).eval()(input_ids=ids).logits, rtol=0, atol=1e-5
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What does `sort_array` do?"}]
    prompts = artifact.prompts(Split.TRAIN)
    served = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    assert served in [prompts[i].tolist() for i in range(len(prompts))] or served[0] == artifact.bos_id
    assert served.count(artifact.bos_id) == 1


def prepared_objective(
    stage: Stage,
    inputs: dict[str, ArtifactRef],
    artifact: TokensArtifact,
    home: Path,
    *,
    config: TrainConfig | None = None,
) -> Any:
    from stages.train.engines.choose import make_engine

    config = config or CONFIGS[stage]
    context = make_context(home, stage, config, inputs)
    prepared = prepare_of(stage)(context, artifact)
    engine = make_engine(prepared.parts, config, context.execution)
    return engine, prepared.objective(engine)


def train_all(engine: Any, objective: Any) -> None:
    from stages.train.engine import Share

    before = engine.model_weights("policy")["model.norm.weight"].clone()
    for step in objective.steps(engine):
        engine.backward(objective.loss, [Share(batch, 1.0) for batch in step.micro_batches])
        engine.step(1e-2)
    assert not torch.equal(engine.model_weights("policy")["model.norm.weight"], before)


def test_the_reference_of_ppo_does_not_move(stage_inputs: Inputs, artifact: TokensArtifact, tmp_path: Path) -> None:
    engine, objective = prepared_objective(Stage.PPO, stage_inputs[Stage.PPO], artifact, tmp_path)
    frozen = objective._sampler.reference
    before = {name: weight.clone() for name, weight in frozen.state_dict().items()}
    train_all(engine, objective)
    assert all(torch.equal(weight, before[name]) for name, weight in frozen.state_dict().items())


def test_the_reference_of_dpo_is_the_start_also_after_training_and_in_a_second_attempt(
    stage_inputs: Inputs, artifact: TokensArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages.dpo
    from stages.train.reference import FIELD

    inputs = stage_inputs[Stage.DPO]
    engine, objective = prepared_objective(Stage.DPO, inputs, artifact, tmp_path)
    train_all(engine, objective)
    start = load_causal_lm(Path(inputs["model"].uri.removeprefix("file://")), artifact).eval()
    loaded: list[Path] = []

    def load_once(folder: Path, *arguments: Any, **options: Any) -> Any:
        assert not loaded, "the reference is loaded although its log-probabilities are in the store"
        loaded.append(folder)
        return load_causal_lm(folder, *arguments, **options)

    monkeypatch.setattr(stages.dpo, "load_causal_lm", load_once)
    engine, objective = prepared_objective(Stage.DPO, inputs, artifact, tmp_path)
    seen = 0
    for step in objective.steps(engine):
        for batch in step.micro_batches:
            carried = batch.fields[FIELD][batch.loss_mask_BT == 1]
            torch.testing.assert_close(carried, target_logprobs(start, batch).logprobs_N, rtol=1e-4, atol=1e-5)
            seen += batch.num_segments // 2
    assert seen == len(artifact.pairs(Split.TRAIN))


@pytest.mark.parametrize("loss", [SimPOLoss(), ORPOLoss()], ids=lambda loss: loss.kind)
def test_a_preference_loss_without_reference_computes_and_stores_none(
    loss: PreferenceLoss, stage_inputs: Inputs, artifact: TokensArtifact, tmp_path: Path
) -> None:
    config = CONFIGS[Stage.DPO].model_copy(update={"loss": loss})
    engine, objective = prepared_objective(Stage.DPO, stage_inputs[Stage.DPO], artifact, tmp_path, config=config)
    train_all(engine, objective)
    of_orpo = {"eval/dpo_sft_loss"} if isinstance(loss, ORPOLoss) else set()
    assert set(objective.evaluate(engine)) == {"eval/loss", "eval/dpo_accuracy", "eval/dpo_margin"} | of_orpo
    assert not list(tmp_path.rglob("*reference-logprobs*"))


def test_float16_scales_the_loss_and_learns_the_same(
    stage_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allowed on GPUs only; the CPU emulates it, which is enough to see that what is scaled is unscaled."""
    monkeypatch.setattr("stages.train.engines.torch_engine.check_precision", lambda *_: None)
    config = CONFIGS[Stage.PRETRAIN]
    exact = run_training(tmp_path / "fp32", Stage.PRETRAIN, config, stage_inputs[Stage.PRETRAIN])
    half = config.model_copy(update={"precision": "fp16"})
    scaled = run_training(tmp_path / "fp16", Stage.PRETRAIN, half, stage_inputs[Stage.PRETRAIN])
    for row, expected in zip(scaled.history, exact.history, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=2e-2)
        assert row["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=2e-2)
        assert row["train/skipped_steps"] == 0


def test_non_finite_steps_are_skipped_counted_and_then_end_the_stage(stage_inputs: Inputs, tmp_path: Path) -> None:
    from stages.config.errors import NonFiniteError

    config = CONFIGS[Stage.PRETRAIN].model_copy(
        update={"optimizer": CONFIGS[Stage.PRETRAIN].optimizer.model_copy(update={"learning_rate": 1e38})}
    )
    with pytest.raises(NonFiniteError, match=r"5 steps in a row.*"):
        run_training(tmp_path, Stage.PRETRAIN, config, stage_inputs[Stage.PRETRAIN])
