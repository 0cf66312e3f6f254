"""What operators see: metrics, logs of requests and of troubles, names of callers."""
