"""The doors: RPC by Unix socket and TCP, and the attach socket."""
