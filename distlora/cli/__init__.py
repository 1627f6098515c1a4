"""The command line. `main.main` runs one verb; the other modules are started by launch scripts: nothing here
is for programs.
"""
