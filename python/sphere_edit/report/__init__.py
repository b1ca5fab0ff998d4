"""What a run folder tells: its page, plots and figures."""
