"""The transaction protocol: what a transaction is to do, and the loop that does it."""
