"""The backend's operators, one per file: a reference on any device, and the same with kernels."""
