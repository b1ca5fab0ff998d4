"""The report of a run: page, plots and figures, made from the run folder."""
