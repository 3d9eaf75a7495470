"""The receiver: one process per node that asks the servers for samples, and the ranks' side of it."""
