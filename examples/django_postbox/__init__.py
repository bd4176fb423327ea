"""Letters with scans in Django: an upload form and an admin whose files commit with their rows.

To try it, let `uv run examples/s3_server.py letters` run in one terminal, and in another one:

```bash
export AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
export PYTHONPATH=examples DJANGO_SETTINGS_MODULE=django_postbox.settings
uv run --group examples django-admin migrate
uv run --group examples django-admin createsuperuser
uv run --group examples gunicorn --workers 3 django_postbox.wsgi
```
"""
