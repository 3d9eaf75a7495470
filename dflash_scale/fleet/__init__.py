"""Which server is asked for which sample, and what happens when it fails: no socket, thread, clock or configuration."""
