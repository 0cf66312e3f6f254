"""The program in a simulated world: its own clock, network, Redis and API, every order of events by seed."""
