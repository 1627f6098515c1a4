"""What it means to train: engines, the ranks under them, and the ledger of what was added to frozen weights.

`protocol` says what an engine answers. `local` is the one in plain PyTorch, which defines the meaning, and
`zero` the one on DeepSpeed ZeRO. `boundary` is what belongs around an optimizer step, `comm` the process
group, `ledger` and `owners` what is kept of frozen weights and by whom, `optimizers` the optimizers,
`schedules` their learning rates, and `peaks` what GPUs can compute at most. Nothing here knows a recipe, or
asks the environment.
"""
