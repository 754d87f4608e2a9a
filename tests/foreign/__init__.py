"""Test suites of other projects, run against precast (`make foreign`).

`run.py` gets the suites and runs each with pytest and one of the adapters here, which are pytest plugins: they put ours
in the place of what a suite tests. `tally.py` counts. Nothing of the suites is kept in this repository.
"""
