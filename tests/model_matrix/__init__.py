"""Which classes of models do what: a tiny model of each is trained, on one process and on two ranks under
ZeRO-3, exported and loaded again. `python -m tests.model_matrix` writes the table to docs/models.md.
"""
