"""The bottom layer: errors, options, locks, ranges, zeroes, threads. Knows nothing of nodes or drivers."""
