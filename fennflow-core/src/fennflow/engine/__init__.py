"""The engine: it decides by the protocol what a transaction does, and does it."""
