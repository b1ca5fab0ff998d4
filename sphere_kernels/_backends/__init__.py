"""The implementations' common ground: when each can run, how it is called, and the table of operations."""
