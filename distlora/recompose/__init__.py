"""Recomposition: in training, components of the adapter are fused into the frozen weight and replaced.

recomposer        `Recomposer`, which follows a run step by step
report            `RecompositionReport`, what a decision about recomposition looked like
stacks            a layer as its matrices, of which a stack of experts has many
scores, reserve, refill, initial_values, ages, shards
                  what the recomposer keeps, and where new components come from

The training loop uses `Recomposer` and passes on its reports. The rest is the folder's own.
"""
