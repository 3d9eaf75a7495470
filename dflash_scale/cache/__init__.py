"""Hidden states on disk: a folder, a file a sample."""
