"""What methods and runs come to, side by side: tables for the terminal, and pages with pictures.

    records ─► runs ─► compare ─► scores, costs, curves ─► drawing, sections, appendix ─► build

`methods_table.methods_table` is what `distlora methods` prints. `build.write_report` is `distlora report`:
it reads run directories (`runs`), puts those together that can be compared (`compare`), and writes one page
(`page`) as Markdown and as HTML. `inference_cost` counts parameters, MACs and FLOPs. `board` shows runs in
TensorBoard.

Other folders use these two functions and those of `board`.
"""
