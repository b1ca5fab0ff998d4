"""What the implementations stand on: when each can run, how it is called, and the table of what each computes."""
