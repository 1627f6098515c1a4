"""Files on disk that survive a crash.

`atomic` writes texts and JSON as a whole, and computes checksums; it does without torch. `tensors` reads and
writes safetensors files one tensor at a time. All public names of both are for other folders.
"""
