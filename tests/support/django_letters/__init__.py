"""An app of Django's with files, for tests."""
