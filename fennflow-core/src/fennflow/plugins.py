"""Discovery: which plugins are installed, what they provide, and what is wrong with them.

pluggy by itself lets one plugin that fails to import stop every look-up, ignores a misspelt hook,
and silently drops one of two plugins with the same name. This module reports these three cases.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal, TypeVar

import pluggy

from fennflow import hookspecs
from fennflow._migration import renamed
from fennflow.exceptions import PluginException
from fennflow.hookspecs import (
    HOOKSPEC_VERSION,
    BackendPlugin,
    ConnectorPlugin,
    ContentTypePlugin,
)

if TYPE_CHECKING:
    from fennflow.config import BackendConfig, ConnectorConfig
    from fennflow.files.content import BaseContent

__all__ = ["InstalledPlugin", "PluginRegistry", "installed", "override", "registry"]

GROUP = "fennflow"
DISABLE_VARIABLE = "FENNFLOW_DISABLE_PLUGINS"
HOOK_PREFIX = "fennflow_"
_MEDIA_TYPES = re.compile(r"[a-z0-9!#$&^_.+-]+/(?:\*|[a-z0-9!#$&^_.+-]+)")

_EXTRAS: Mapping[str, Mapping[str, str]] = {
    "fennflow.connectors": {"ObstoreConnectorConfig": "obstore", "S3ConnectorConfig": "s3"},
    "fennflow.backends": {"BucketBackendConfig": "bucket", "SqlalchemyBackendConfig": "sqlite"},
}
"""The configs of FennFlow's own packages and their extras, by the module that exports them."""

_Config = TypeVar("_Config", "ConnectorConfig", "BackendConfig")
_Plugin = TypeVar("_Plugin", "ConnectorPlugin", "BackendPlugin")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledPlugin:
    """A plugin that is installed, whether it works or not.

    Args:
        name: the name of its entry point.
        distribution: the package that provides it.
        version: of that distribution.
        module: the module that the entry point names.
        disabled: whether `FENNFLOW_DISABLE_PLUGINS` or `override` switched it off.
        error: what is wrong with it.
    """

    name: str
    distribution: str
    version: str
    module: str
    disabled: bool = False
    error: PluginException | None = None


@dataclass(slots=True)
class PluginRegistry:
    """What the plugins provide; built once, when the first unit of work is constructed."""

    plugins: list[InstalledPlugin] = field(default_factory=list["InstalledPlugin"])
    connectors: list[ConnectorPlugin] = field(default_factory=list["ConnectorPlugin"])
    backends: list[BackendPlugin] = field(default_factory=list["BackendPlugin"])
    content_types: list[ContentTypePlugin] = field(default_factory=list["ContentTypePlugin"])
    conflict: PluginException | None = None

    def connector_for(self, config: ConnectorConfig) -> ConnectorPlugin:
        """Return the plugin that registered the class of a config.

        Raises:
            PluginException: none did.
        """
        return self._plugin_for(config, self.connectors)

    def backend_for(self, config: BackendConfig) -> BackendPlugin:
        """Return the plugin that registered the class of a config.

        Raises:
            PluginException: none did.
        """
        return self._plugin_for(config, self.backends)

    def content_class(self, tag: str | None, media_type: str) -> type[BaseContent] | None:
        """Return the class that reads an object, by its tag or else by its media type, if there is one."""
        base, _, variant = (tag or "").partition(":")
        for plugin in self.content_types:
            if plugin.tag == base:
                found = plugin.content.from_variant(variant) if variant else plugin.content
                if found is not None:
                    return found
        essence = media_type.partition(";")[0].strip().lower()
        for wanted in (essence, essence.partition("/")[0] + "/*"):
            for plugin in self.content_types:
                if wanted in plugin.media_types:
                    return plugin.content
        return None

    def content_tag(self, content: type[BaseContent]) -> str:
        """Return the tag under which a class, or the nearest class it extends, is registered.

        A variant of that class follows after a colon.

        Raises:
            PluginException: no plugin registered any of them.
        """
        for base in content.__mro__:
            for plugin in self.content_types:
                if plugin.content is base:
                    variant = content.variant()
                    return plugin.tag if variant is None else f"{plugin.tag}:{variant}"
        raise self.missing(content)

    def missing(self, what: str | type) -> PluginException:
        """Return the error for a class that no working plugin provides."""
        if isinstance(what, type):
            what = f"{what.__module__}.{what.__qualname__}"
        broken = [plugin.error for plugin in self.plugins if plugin.error is not None]
        off = ", ".join(plugin.name for plugin in self.plugins if plugin.disabled)
        message = f"No working plugin provides {what}."
        if broken:
            message += " Broken: " + " ".join(map(str, broken))
        if off:
            message += f" Switched off by {DISABLE_VARIABLE} or override(): {off}."
        error = PluginException(message)
        error.__cause__ = broken[0] if broken else None
        return error

    def _plugin_for(self, config: _Config, plugins: Iterable[_Plugin]) -> _Plugin:
        for plugin in plugins:
            if plugin.config is type(config):
                return plugin
        raise self.missing(type(config))


_lock = threading.RLock()
_current: PluginRegistry | None = None


def registry() -> PluginRegistry:
    """Return what the plugins provide, discovering them at the first call.

    Raises:
        PluginException: two plugins share a name, a config class, a content class, a tag or a
            media type.
    """
    found = _discovered()
    if found.conflict is not None:
        raise found.conflict
    return found


def installed() -> Sequence[InstalledPlugin]:
    """Return all plugins that are installed, with what is wrong with them.

    Example:
        ```python
        from fennflow import plugins

        print([plugin.name for plugin in plugins.installed() if plugin.name == "memory"])
        #> ['memory']
        ```
    """
    return tuple(_discovered().plugins)


@contextmanager
def override(*modules: object, disable: Collection[str] = ()) -> Generator[PluginRegistry]:
    """Add plugins and switch others off inside the block, for tests.

    Args:
        modules: objects with hook implementations, as the module of a plugin has.
        disable: names of entry points.

    Example:
        ```python
        from fennflow import plugins

        with plugins.override(disable=["s3"]) as registry:
            print("s3" in [plugin.name for plugin in registry.connectors])
            #> False
        ```
    """
    global _current  # noqa: PLW0603 - the registry of the process
    with _lock:
        before = _current
        _current = _discover(modules, disable)
    try:
        yield _current
    finally:
        with _lock:
            _current = before


def config_class(kind: Literal["connector", "backend"], name: str, module: str) -> object:
    """Return the config class with this name that a plugin provides; called by `__getattr__`.

    Raises:
        AttributeError: the name is private or special, so no import statement uses it.
        PluginException: a plugin that may provide it is broken or switched off.
        ImportError: no plugin provides it. Not AttributeError: `from x import y` drops its text.
    """

    def classes(found: PluginRegistry) -> list[type]:
        plugins = found.connectors if kind == "connector" else found.backends
        return [plugin.config for plugin in plugins]

    return _named(classes, name, module)


def content_class(name: str, module: str) -> object:
    """Return the content class with this name that a plugin provides; like `config_class`."""
    return _named(lambda found: [plugin.content for plugin in found.content_types], name, module)


def _named(classes: Callable[[PluginRegistry], list[type]], name: str, module: str) -> object:
    if name.startswith("_"):
        message = f"module {module!r} has no attribute {name!r}"
        raise AttributeError(message)
    wanted = f"{module}.{name}"
    found = _discovered()
    by_name = {cls.__name__: cls for cls in classes(found)}
    if name in by_name:
        return by_name[name]
    former = renamed(wanted)
    if former is not None:
        raise ImportError(former, name=module)
    if any(plugin.error or plugin.disabled for plugin in found.plugins):
        raise found.missing(wanted)
    extras = _EXTRAS.get(module, {})
    near = difflib.get_close_matches(name, {*by_name, *extras}, n=1)
    if name in near:
        message = ""
    elif near:
        message = f"{wanted} does not exist. Did you mean {near[0]}?"
    else:
        message = f"{wanted} does not exist. Installed: {', '.join(sorted(by_name))}."
    if near and near[0] not in by_name:
        extra = extras[near[0]]
        message += f" {module}.{near[0]} is not installed: pip install 'fennflow[{extra}]>=1.0'"
    raise ImportError(message.strip(), name=module)


def _discovered() -> PluginRegistry:
    global _current  # noqa: PLW0603 - the registry of the process
    with _lock:
        if _current is None:
            _current = _discover((), ())
        return _current


def _discover(modules: Iterable[object], disable: Collection[str]) -> PluginRegistry:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    off = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")} | set(disable)
    found = PluginRegistry()
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for point in entry_points(group=GROUP):
        dist = point.dist
        plugin = InstalledPlugin(
            name=point.name,
            distribution=dist.name if dist else "unknown",
            version=dist.version if dist else "unknown",
            module=point.value,
            disabled=point.name in off,
        )
        if not plugin.disabled:
            owners[f"plugin name {plugin.name!r}"].append(plugin.distribution)
            plugin = _register(manager, found, owners, plugin, point.load)
        found.plugins.append(plugin)
    for module in modules:
        name = getattr(module, "__name__", type(module).__name__)
        plugin = InstalledPlugin(name=name, distribution="override()", version="none", module=name)
        plugin = _register(manager, found, owners, plugin, partial(_identity, module))
        found.plugins.append(plugin)
    doubled = [f"{what} by {' and '.join(by)}" for what, by in owners.items() if len(by) > 1]
    if doubled:
        found.conflict = PluginException(
            f"Provided twice: {'; '.join(doubled)}. Uninstall one of them, "
            f"or switch the plugin off with {DISABLE_VARIABLE}."
        )
    return found


def _identity(module: object) -> object:
    return module


def _register(
    manager: pluggy.PluginManager,
    found: PluginRegistry,
    owners: defaultdict[str, list[str]],
    plugin: InstalledPlugin,
    load: Callable[[], object],
) -> InstalledPlugin:
    """Register one plugin and collect what it provides; after an error it provides nothing."""
    try:
        module = load()
        _check_version(module)
        manager.register(module, name=f"{plugin.name} ({plugin.distribution})")
        _check_hooks(manager, module)
        brought = _collect(manager, module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - reported by `installed()` and when it is used
        problem = PluginException(
            f"Plugin {plugin.name!r} ({plugin.module}) of {plugin.distribution} "
            f"{plugin.version} does not work: {type(error).__name__}: {error}"
        )
        problem.__cause__ = error
        return replace(plugin, error=problem)
    found.connectors.extend(brought.connectors)
    found.backends.extend(brought.backends)
    found.content_types.extend(brought.content_types)
    for claim in _claims(brought):
        owners[claim].append(f"{plugin.distribution} ({plugin.name})")
    return plugin


def _claims(brought: PluginRegistry) -> Generator[str]:
    """Iterate over the names that only one plugin may claim."""
    for connector in brought.connectors:
        yield f"connector name {connector.name!r}"
        yield f"connector config {connector.config.__name__}"
    for backend in brought.backends:
        yield f"backend name {backend.name!r}"
        yield f"backend config {backend.config.__name__}"
    for content_type in brought.content_types:
        yield f"content type tag {content_type.tag!r}"
        yield f"content class {content_type.content.__name__}"
        for media_type in sorted(set(content_type.media_types)):
            yield f"media type {media_type!r}"


def _check_version(module: object) -> None:
    version = getattr(module, "FENNFLOW_HOOKSPEC_VERSION", HOOKSPEC_VERSION)
    if version != HOOKSPEC_VERSION:
        message = (
            f"it was built for version {version} of FennFlow's hook specs, and this is version "
            f"{HOOKSPEC_VERSION}. Install releases of both that fit."
        )
        raise PluginException(message)


def _check_hooks(manager: pluggy.PluginManager, module: object) -> None:
    """Refuse a hook that pluggy would ignore: misspelt, or not marked."""
    callers = manager.get_hookcallers(module) or []
    implemented = {caller.name for caller in callers}
    known = {name for name in vars(manager.hook) if name.startswith(HOOK_PREFIX)}
    known -= {caller.name for caller in callers if not caller.has_spec()}
    looks_like_hooks = {
        name
        for name in dir(module)
        if name.startswith(HOOK_PREFIX) and callable(getattr(module, name))
    }
    for name in sorted(implemented | looks_like_hooks):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            message = f"it implements {name}, which is not a hook; {hint}"
            raise PluginException(message)
        if name not in implemented:
            message = f"its {name} is not marked with @fennflow.hookspecs.hookimpl"
            raise PluginException(message)
    if not implemented:
        message = "it implements no hook"
        raise PluginException(message)


def _collect(manager: pluggy.PluginManager, module: object) -> PluginRegistry:
    """Call the hooks of one plugin, and check what they return."""
    others = [plugin for plugin in manager.get_plugins() if plugin is not module]

    def call(hook: str, kind: type[_Brought]) -> list[_Brought]:
        results: list[Iterable[object]] = manager.subset_hook_caller(hook, others)()
        items = [item for result in results for item in result]
        for item in items:
            if not isinstance(item, kind):
                message = f"{hook} returned {item!r}, which is not a {kind.__name__}"
                raise PluginException(message)
        return [item for item in items if isinstance(item, kind)]

    content_types = call("fennflow_content_types", ContentTypePlugin)
    for content_type in content_types:
        for media_type in content_type.media_types:
            if not _MEDIA_TYPES.fullmatch(media_type):
                message = (
                    f"the media type {media_type!r} of {content_type.tag!r} is not a type and a "
                    "subtype in lower case, such as text/csv or text/*"
                )
                raise PluginException(message)
    return PluginRegistry(
        connectors=call("fennflow_connectors", ConnectorPlugin),
        backends=call("fennflow_backends", BackendPlugin),
        content_types=content_types,
    )


_Brought = TypeVar("_Brought", "ConnectorPlugin", "BackendPlugin", "ContentTypePlugin")
