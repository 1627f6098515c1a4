"""What other software loads: an ordinary LoRA in PEFT's format (`peft`), or the merged model (`merged`).

`sources` reads what an export is made from: the live engine, a checkpoint or an earlier export. `draft` makes
a directory that appears only when it is complete. `placing` says what each tensor of the merged files holds,
`companions` copies the files around them, and `check` compares the result with the run. `experts` puts pairs
of experts into PEFT's form.
`distlora.training.export_run` joins them.
"""
