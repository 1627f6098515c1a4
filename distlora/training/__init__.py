"""A run of a recipe, from its check to the exported adapter, on the public calls of `distlora.api`.

`train` has the ways in: `check`, `train` and `evaluate`. `run` is the run stage by stage, `build` its
model, `loop` its steps. `evaluated` says what an evaluation reads, `evaluation_jobs` what it has to do, and
`evaluation_scores` does it. `monitor` writes scalars, and `board`, `layer_looks`, `speed` and `pictures` what
TensorBoard and the other monitors show beside the losses. Others use these, `objective`, `run_directory` and
`export_run`.
"""
