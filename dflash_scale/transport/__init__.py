"""Messages and bytes between server, receiver and rank."""
