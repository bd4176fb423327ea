"""The transaction protocol: what a session is to do, and the loop that does it."""
