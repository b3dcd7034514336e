"""What a response is worth: a reward model reads ids on all ranks together, the others read texts, each on its own."""
