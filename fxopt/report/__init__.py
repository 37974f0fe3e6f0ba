"""Reports: what an optimisation did, as data, text and HTML."""
