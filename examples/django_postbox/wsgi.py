"""The application, for Gunicorn and others."""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "django_postbox.settings")
application = get_wsgi_application()
