"""What it takes, and what it gives, beside what else there is: `python -m benchmarks`, `benchmarks.day`."""
