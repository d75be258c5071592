"""What people see; imports nothing by itself.

`show` prints the `report`, made of `tables` and the timeline of `gantt`. `sweep` and `sizes` are many plans side by side,
over budgets and over image sizes; `plots` are pictures.
"""
