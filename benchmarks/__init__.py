"""What it takes, and what it gives, beside what else there is.

`python -m benchmarks` measures speed and memory beside nginx, Varnish, and the cache that one writes in an
afternoon; `benchmarks.bursts`, `benchmarks.day` and `benchmarks.documents` are programs of their own. What
they print is kept in `benchmarks/RESULTS.md`: the first puts its section there itself, with `--write`.
"""
