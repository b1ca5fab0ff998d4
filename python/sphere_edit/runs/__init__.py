"""The folder of a run: its files, its journal, and the options recorded in it."""
