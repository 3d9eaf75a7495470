"""One run of training, rank by rank: where its rows come from, the step, what it writes."""
