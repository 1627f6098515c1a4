"""What other software loads: an ordinary LoRA in PEFT's format (`peft`), or the merged model (`merged`)."""
