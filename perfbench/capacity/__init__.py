"""How many devices a fleet of tenants needs, by a simulation of the server; nothing is run."""
