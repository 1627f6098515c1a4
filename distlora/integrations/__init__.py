"""Training loops of others, in which any method runs as in ours: transformers' `Trainer` and TRL's trainers.

Each module is loaded when it is imported, and then needs the package that it is named after.
"""
