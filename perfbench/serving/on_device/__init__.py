"""What runs in the server's process: the engine in a thread of its own, and HTTP beside it."""
