"""Export a PyTorch module with named inputs, outputs and dimensions; what the torch frontends share."""
