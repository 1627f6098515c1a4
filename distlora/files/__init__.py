"""Files on disk that survive a crash.

`atomic` writes texts, JSON and directories as a whole, and computes checksums. `ownership` is a file that
names the one process that owns something, and `processes` says whether it runs. `problems` puts errors of
disks and files into sentences, `user_paths` reads paths as users write them, and `user_texts` their texts.
These do without torch. `tensors` reads and writes safetensors files one tensor at a time. All their public
names are for other folders.
"""
