"""The tables of the README and of docs/gpu.md, and the plots, from the stored rows: ``python -m benchmarks``."""

from benchmarks import gpu_page, plots, tables

tables.main(check=False)
gpu_page.main()
plots.main()
