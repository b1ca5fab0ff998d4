"""Write the tables of the pages under docs, and the plots, from stored rows: ``python -m benchmarks``."""

from benchmarks import gpu_page, plots, support, tables
from benchmarks.models import page as models

tables.main(check=False)
gpu_page.main()
support.write()
models.write()
plots.main()
