"""The only way to the upstream: quota, order, connections, breaker."""
