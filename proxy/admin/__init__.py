"""HTTP towards operators: metrics and probes."""
