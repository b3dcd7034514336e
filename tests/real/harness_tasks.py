"""Three small tasks of lm-evaluation-harness as files: choices with examples, a likelihood, and written answers."""

import json
from pathlib import Path

import yaml

PRODUCTS = tuple((first, second) for first in (3, 6, 7, 8, 9, 12) for second in (4, 7, 8, 11))
SENTENCES = (
    ("The opposite of hot is", "cold"),
    ("The sun rises in the", "east"),
    ("Water freezes at zero degrees", "Celsius"),
    ("He opened the door with his", "key"),
    ("Two plus two equals", "four"),
    ("A baby dog is called a", "puppy"),
    ("The sky on a clear day is", "blue"),
    ("She sells sea shells by the sea", "shore"),
    ("Shakespeare wrote Romeo and", "Juliet"),
    ("The first month of the year is", "January"),
    ("The Eiffel Tower stands in", "Paris"),
    ("An octopus has eight", "arms"),
)
SUMS = tuple((first, second) for first in (3, 14, 25, 40) for second in (2, 5, 11))


def write_tasks(folder: Path) -> dict[str, Path]:
    """Write the tasks and their data, and return the files by the tasks' names."""
    choices = []
    for place, (first, second) in enumerate(PRODUCTS):
        right = first * second
        wrong = [right + first, right - second, first + second]
        options = [str(one) for one in (*wrong[: place % 4], right, *wrong[place % 4 :])]
        choices.append({"a": first, "b": second, "options": options, "right": options.index(str(right))})
    _rows(folder / "products.jsonl", choices[4:])
    _rows(folder / "examples.jsonl", choices[:4])
    _rows(folder / "sentences.jsonl", [{"start": start, "end": end} for start, end in SENTENCES])
    _rows(folder / "sums.jsonl", [{"a": a, "b": b, "sum": a + b} for a, b in SUMS])
    tasks = {
        "small_products": {
            "dataset_kwargs": {"data_files": {"test": "products.jsonl", "train": "examples.jsonl"}},
            "test_split": "test",
            "fewshot_split": "train",
            "num_fewshot": 2,
            "output_type": "multiple_choice",
            "doc_to_text": "Question: What is {{a}} times {{b}}?\nAnswer:",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{right}}",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        },
        "small_sentences": {
            "dataset_kwargs": {"data_files": {"test": "sentences.jsonl"}},
            "test_split": "test",
            "output_type": "loglikelihood",
            "doc_to_text": "{{start}}",
            "doc_to_target": " {{end}}",
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
        "small_sums": {
            "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "Question: What is 1 plus 1?\nAnswer: 2\n\nQuestion: What is {{a}} plus {{b}}?\nAnswer:",
            "doc_to_target": "{{sum}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 80, "do_sample": False},
            "metric_list": [
                {
                    "metric": "exact_match",
                    "aggregation": "mean",
                    "higher_is_better": True,
                    "ignore_case": True,
                    "regexes_to_ignore": [r"\s"],
                }
            ],
            "filter_list": [
                {"name": "strict", "filter": [{"function": "take_first"}]},
                {
                    "name": "first-number",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"(\d+)"},
                        {"function": "take_first"},
                    ],
                },
            ],
        },
    }
    files = {}
    for name, task in tasks.items():
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump({"task": name, "dataset_path": "json", **task}, sort_keys=False))
    return files


def _rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
