"""Live traffic: how many tenants, or requests a second, can be served under a target for latency."""
