"""What other software loads: an ordinary LoRA in PEFT's format (`peft`), or the merged model (`merged`).

`sources` reads what an export is made from: the live engine, a checkpoint or an earlier export. `draft` makes
a directory that appears only when it is complete. `distlora.training.export_run` joins them.
"""
