"""A run of a recipe, from its check to the exported adapter, on the public calls of `distlora.api`.

`train` has the ways in: `check`, `train` and `evaluate`. `run` is the run stage by stage, `build` its
model, `loop` its steps. Others use these, `objective`, `run_directory` and `export_run`.
"""
