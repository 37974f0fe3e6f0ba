"""The planner: which candidates of all passes together, under one error budget."""
