"""Training of the demo drafter: prompts, self-distillation text, training, evaluation (see tools/train_drafter.py)."""
