"""Evaluation: answers that are generated, and labels that are predicted, on the samples of all ranks.

`scoring` has a function for each kind of task: `exact_match` for responses, `label_scores` for labels. The
loss of a language model is evaluated with the training step, in `distlora.training.step`.
"""
