"""What the daemon shares with workers: arena, directory, session pages, and the way to them."""
