"""The form, the admin, and the files."""

from django.contrib import admin
from django.contrib.admin.views.decorators import staff_member_required
from django.urls import path, reverse_lazy
from django.views.generic import CreateView

from django_postbox.models import Letter
from fennflow_django.views import serve

upload = CreateView.as_view(
    model=Letter,
    fields=["title", "scan"],
    template_name="upload.html",
    success_url=reverse_lazy("upload"),
)
urlpatterns = [
    path("", upload, name="upload"),
    path("admin/", admin.site.urls),
    path("media/<path:path>", staff_member_required(serve)),
]
