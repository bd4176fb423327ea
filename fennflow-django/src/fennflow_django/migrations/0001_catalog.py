"""Creates the catalog of files, in the databases that storages name."""

from typing import ClassVar

from django.db import migrations
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.state import StateApps

from fennflow_django.upkeep import create_catalogs


def create(apps: StateApps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    """Create the tables."""
    del apps
    create_catalogs(schema_editor.connection)


class Migration(migrations.Migration):
    """Creates the tables; they have no models, so no later migration affects them."""

    initial = True
    atomic = False
    dependencies: ClassVar = []
    # The reverse migration does nothing: only the catalog knows the files of the bucket.
    operations: ClassVar = [migrations.RunPython(create, migrations.RunPython.noop)]
