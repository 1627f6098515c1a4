"""Tables about methods, for the terminal.

Other folders use `methods_table.methods_table`, which is what `distlora methods` prints.
"""
