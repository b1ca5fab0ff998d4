"""The command line: commands of ``sphere-edit``, options, and terminal output."""
