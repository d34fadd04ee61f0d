"""Side-by-side measurements of the toolkit: `python -m benchmarks`."""
