"""Local exact rewrites: pattern, check, replace; one file per rule."""
