"""The start of a run: the factors of all layers, and new heads, the same at every ZeRO stage and world size.

factors       `initialise`, and `install_gradient_maps` after a checkpoint was read
search        the size of a first step, by a line search
probe         full gradients of the layers, from a few samples: `Probe`, `mean_gradients`
trial         what a method does to a layer, found by initialising a small one
experts       the start of a stack of experts
dead_starts   factors that could never train as they start
heads         new heads
pretrained    pretrained weights, read from their files again

Recomposition, training and the plan use these names. `search` is for `factors` and the benchmarks.
"""
