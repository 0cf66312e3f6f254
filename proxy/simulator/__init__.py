"""DigitalOcean's snapshot API on loopback, for the demo, the tests and the benchmarks."""
