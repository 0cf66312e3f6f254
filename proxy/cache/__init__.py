"""The main path: look up, decide, fetch once for all, keep."""
