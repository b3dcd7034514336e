"""The other side: Hugging Face Trainer and TRL as their users run them, in an environment of their own.

Run by the benchmark, never imported: `<peers' python> tests/bench/peers.py <kind> <model folder> <rows> <options>`.
Settings are the trainers' own defaults unless the options say otherwise; only the order of the data is fixed, so that
both sides train on the same.
"""

import json
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from protocol import Rounds  # pyright: ignore[reportMissingImports]
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Pause(TrainerCallback):
    """Ends a round after its steps."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._rounds.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._rounds.step()


def counted(trainer_class: type, rounds: Rounds, unit: str) -> type:
    """The trainer, counting the work of each step and reading its data in the given order."""

    class Counted(trainer_class):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
            ids = inputs["input_ids"]
            if unit == "pairs":
                rounds.count(len(ids) / 2)
            else:
                mask = inputs.get("attention_mask")
                rounds.count(float(ids.numel() if mask is None else mask.sum()))
            return super().training_step(model, inputs, *arguments, **options)

        def _prepare_dataset(self, dataset: Dataset, *arguments: Any, **options: Any) -> Dataset:
            if "prompt_ids" in dataset.column_names:  # DPO's trainer takes text alone; ours is tokenized
                return dataset
            return super()._prepare_dataset(dataset, *arguments, **options)

    return Counted


def main(kind: str, model_dir: str, rows: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    rounds = Rounds(options["steps"])
    data = Dataset.from_json(rows)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    common = {
        "output_dir": tempfile.mkdtemp(prefix="athanor-bench-"),
        "per_device_train_batch_size": options["batch"],
        "max_steps": 100_000,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "bf16": options["bf16"],
        "logging_steps": 1,  # as often as we log
        "disable_tqdm": True,
    } | options["arguments"]
    causal = {"dtype": torch.float32}
    match kind:
        case "pretrain":
            model = AutoModelForCausalLM.from_pretrained(model_dir, **causal)
            data = data.map(lambda row: {"labels": row["input_ids"]})
            trainer = counted(Trainer, rounds, "tokens")(model, TrainingArguments(**common), train_dataset=data)
        case "sft":
            from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

            model = AutoModelForCausalLM.from_pretrained(model_dir, **causal)
            arguments = SFTConfig(**common, max_length=512, completion_only_loss=True)
            trainer = counted(SFTTrainer, rounds, "tokens")(
                model, arguments, train_dataset=data, processing_class=tokenizer
            )
        case "reward":
            from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportMissingImports]

            model = AutoModelForSequenceClassification.from_pretrained(
                model_dir, num_labels=1, pad_token_id=tokenizer.pad_token_id, **causal
            )
            data = data.map(
                lambda row: {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")},
                remove_columns=["prompt_ids"],
            )
            arguments = RewardConfig(**common, max_length=512, center_rewards_coefficient=0.01)
            trainer = counted(RewardTrainer, rounds, "pairs")(
                model, arguments, train_dataset=data, processing_class=tokenizer
            )
        case "dpo":
            from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

            model = AutoModelForCausalLM.from_pretrained(model_dir, **causal)
            if common.get("precompute_ref_log_probs"):
                data = data.select(range(options["batch"] * options["steps"] * options["rounds"]))
            trainer = counted(DPOTrainer, rounds, "pairs")(
                model, args=DPOConfig(**common, max_length=512), train_dataset=data, processing_class=tokenizer
            )
        case _:
            raise ValueError(f"unknown kind {kind!r}")
    trainer.add_callback(Pause(rounds))
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
