"""What imbalance costs under expert parallelism: imposed loads, what is measured, and the line through it."""
