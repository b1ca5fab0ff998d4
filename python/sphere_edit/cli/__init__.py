"""The command line: the commands of ``sphere-edit``, their options, and terminal output."""
