"""`distlora doctor`: finds what is wrong with the machines before a run does.

facts, network, storage, toolchain    what one node sees, as JSON; no judgement
cross_checks, node_checks, findings   what that means: pure functions from facts to findings
node                                  the program that runs on every node
remote                                starts it there through ssh, with a time limit
reduction                             an all-reduce between real ranks
hosts, job                            the order of an examination: of hosts from outside, or within a job
examine, subject, table               what is examined, what for, and the table that the user sees
termination                           SIGTERM during an examination

Only the command line uses this folder: `examine.examine`, `table.table` and `termination.exit_on_sigterm`.
"""
