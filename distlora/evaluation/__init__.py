"""Evaluation: answers that are generated or chosen, and labels that are predicted, on the samples of all
ranks.

spreading    which questions a rank answers at once: none is lost or doubled, and batches are filled by tokens
answering    the ways to answer: `Generation` and `Likelihood`
predictions  the file of one task's predictions, from which an evaluation that was cut short goes on
folding      adapters folded into the weights, for the time of an evaluation
scoring      what all this comes to: `answer_questions`, `exact_match`, and `label_scores`

The loss of a language model is evaluated with the training step, in `distlora.training.step`.
"""
