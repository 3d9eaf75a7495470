"""The servers of hidden states, and the processes that they are."""
