"""Sweeps: many runs of one recipe, each with overrides of its own, trained and evaluated one after the other.

lines        the text format: a line of overrides for each run, for job arrays and scripts
file         the YAML format: a `SweepFile`, and the points that it describes
quoting      words that are quoted as in a shell
points       `Point`: a run's overrides, and the directory that is named after them
check        every point is checked before any point is run
claims       no point is run twice at once, whatever sweeps are started
states       what became of each point; the table of a sweep
child        the process of one run, and the signals that are passed on to it
processes    which processes of this host run
conductor    runs what is missing
job_array    the same as a job array of SLURM

The command line uses `lines`, `file`, `check`, `states`, `conductor` and `job_array`.
"""
