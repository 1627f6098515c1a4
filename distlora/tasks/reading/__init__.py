"""How an answer is read in a text that a model has written, as a careful person reads it.

final_answer         what stands behind the last `The answer is`, `####` or `\\boxed{…}`
quantities           the number there; with single_quantity, quantity_tokens, number_words, units
options              the option that is chosen
equivalence          whether two expressions are the same mathematics; with equivalence_worker
plain_text           LaTeX and Markdown as plain characters
"""
