"""The fxopt operators: what passes introduce, one file per operator family."""
