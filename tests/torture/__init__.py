"""Runs that are killed, stopped, cut off, frozen, started twice or out of room at random moments, and that
must end with the bytes of a run to which nothing happened.

`python -m tests.torture --events 500`, or `bash launch/test.sh -m torture`. `plan` says what happens to whom,
`start` starts the ranks, `disk` is a disk that can be filled, `trial` plays one trial and compares.
"""
