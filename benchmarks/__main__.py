"""The README's tables and the plots, from the stored rows: ``python -m benchmarks``."""

from benchmarks import plots, tables

tables.main(check=False)
plots.main()
