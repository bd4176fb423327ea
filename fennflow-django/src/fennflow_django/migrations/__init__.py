"""The catalog as a migration of Django."""
