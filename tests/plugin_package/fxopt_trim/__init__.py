"""A plug-in for fxopt."""
