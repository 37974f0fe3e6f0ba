"""What is saved for a compiled model: libraries, loaders for JavaScript, C and Python, and a manifest."""
