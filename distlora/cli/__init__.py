"""The command line. No other folder imports from here.

`main.main` is the entry point of `distlora` and of `python -m distlora`. `as_rank`, `prepare_launch` and
`quickstart` are started by the scripts in launch/. No module here imports torch when it is imported itself:
`verbs` do so once signals are caught and the words of the command line are known to be right.
"""
