"""What operators cost: work of a node, hardware as data, and the time of that work on that hardware."""
