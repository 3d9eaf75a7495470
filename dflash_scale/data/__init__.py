"""Conversations, the prepared data set, and what is trained when."""
