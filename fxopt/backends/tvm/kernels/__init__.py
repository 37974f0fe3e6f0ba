"""Kernel templates: one file each, a function from sizes and a machine to a TIR function; weights are packed here."""
