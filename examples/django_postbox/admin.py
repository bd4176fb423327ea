"""Letters in Django's admin."""

from django.contrib import admin

from django_postbox.models import Letter

admin.site.register(Letter)
