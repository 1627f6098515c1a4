"""`distlora doctor`: what is wrong with the machines, before a run finds out.

facts.py, network.py, storage.py, toolchain.py   what one node sees, as JSON; no judgement
checks.py, nodechecks.py                         what that means: pure functions from facts to findings
node.py                                          the program that runs on every node
remote.py                                        starting it there: through ssh, with a limit
reduction.py                                     the all-reduce between real ranks
hosts.py, allocation.py                          the order of it all, from outside and from within a job
examine.py, subject.py, table.py                 which of these, what for, and what the user sees
"""
