"""The folder of a run: files, journal, and recorded options."""
