"""Hostile input for everything that reads what users bring.

One rule for each of them: whatever it is given, it returns, or it raises one `UserError` whose message is one
readable line, within the limits of time and memory in `rule.py`.

    rule         the rule, held for one loader and one example
    damage       examples: texts and bytes that were right, and then damaged
    table        LOADERS, the table: one `Loader` for everything that reads
    <subject>    the loaders of one subject: recipes, data, cluster, …

To add loaders, write a module with a tuple of `Loader` and name it in `table.py`. A Loader has a name, a
strategy of Hypothesis for its examples, and `read`, which gets an example and an empty folder and calls the
library. It must raise nothing but UserError.

    Loader("hostfile", damaged(HOSTFILES, WORDS), lambda content, folder: parse_hostfile(content, "hosts"))
    Loader("recipe", damaged_text(RECIPES, WORDS), lambda text, folder: load_recipe(written(folder, text)))

`bash launch/test.sh tests/fuzz` gives 2,000 examples, the same ones every time. More of them, chosen anew:
`python -m tests.fuzz --examples 100000 [--seed N] [LOADER …]`.
"""
