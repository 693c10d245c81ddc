"""Finds plugins, and the classes that they register.

Rules:
1. Whatever is wrong with a plugin ends the start, with one line that names the plugin
   and the distribution that it came from.
2. What is built in are plugins too, which are imported by name like any other.
"""

import importlib
import inspect
import os
import re
import sys
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Sequence,
    Tuple,
    Type,
)

from pluggy import PluginManager, PluginValidationError

from .. import __version__, hookspecs
from ..interfaces import BatchSampler, EvictionPolicy, SchedulerPolicy
from ..routes import METHODS, MODELS, Route

GROUP = "mlx_lm_ext"
# The path of a route: the server looks paths up without doubled slashes and one at the end.
ROUTE = re.compile(r"/|(/[^/?#\s]+)+")
# The plugins that are built in: their modules by their names, and their distribution.
BUILTIN = {
    "builtin": "mlx_lm_ext.plugins.builtin",
    "metrics": "mlx_lm_ext.plugins.metrics",
    "server_info": "mlx_lm_ext.plugins.server_info",
    "status_page": "mlx_lm_ext.plugins.status_page",
    "structured": "mlx_lm_ext.plugins.structured",
    "tokens": "mlx_lm_ext.plugins.tokens",
    "trace": "mlx_lm_ext.plugins.trace",
}
DIST = "mlx-lm-ext"


class PluginError(Exception):
    """What is wrong with a plugin, in one line."""


class PolicyKind(NamedTuple):
    """A kind of class that plugins register.

    Args:
        title (str): What messages call it.
        flag (str): The command-line flag that chooses a class by its name.
        hook (str): The hook that registers the classes.
        interface (Type): The class that they derive from.
        default (str): The name of the built-in class, which replaces one that fails.
    """

    title: str
    flag: str
    hook: str
    interface: Type[Any]
    default: str


EVICTION = PolicyKind(
    "eviction policy",
    "--eviction-policy",
    "mlx_lm_register_eviction_policies",
    EvictionPolicy,
    "lru",
)
SCHEDULER = PolicyKind(
    "scheduler policy",
    "--scheduler",
    "mlx_lm_register_scheduler_policies",
    SchedulerPolicy,
    "fcfs",
)
SAMPLER = PolicyKind(
    "sampler", "--sampler", "mlx_lm_register_samplers", BatchSampler, "default"
)
KINDS = (EVICTION, SCHEDULER, SAMPLER)


class Registered(NamedTuple):
    """A class, and the plugin that registered it."""

    cls: Type[Any]
    plugin: str


class RegisteredRoute(NamedTuple):
    """A route, and the plugin that registered it."""

    route: Route
    plugin: str


class Manager(PluginManager):
    """A plugin manager that refuses what pluggy would ignore or this server cannot use."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        options: Any = super().parse_hookimpl_opts(plugin, name)
        if options is None:
            looks_like_hook = name.startswith("mlx_lm_")
            if looks_like_hook and inspect.isroutine(getattr(plugin, name)):
                raise PluginError(f"{name} is not marked with @mlx_lm_ext.hookimpl")
        elif options["wrapper"] or options["hookwrapper"]:
            raise PluginError(f"{name} is a wrapper, which no hook here can have")
        return options


class Plugins:
    """The plugins of a process.

    Args:
        options (Sequence[str]): The values of ``-p``: names of modules or entry points to
          load, and ``no:NAME`` to block the plugin NAME.
        autoload (bool): Whether to load the plugins that are installed.

    Raises:
        PluginError: If a plugin cannot be loaded, or breaks the contract of a hook.
    """

    def __init__(self, options: Sequence[str] = (), autoload: bool = True):
        self.manager = Manager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.sources: Dict[str, Tuple[str, str]] = {}
        entries = sorted(entry_points(group=GROUP), key=lambda e: e.name)
        named = {e.name: e for e in entries}
        blocked = [o.removeprefix("no:") for o in options if o.startswith("no:")]
        wanted = dict.fromkeys(o for o in options if not o.startswith("no:"))
        for name in blocked:
            if name not in {*BUILTIN, *named, *wanted}:
                known = ", ".join([*BUILTIN, *named])
                raise PluginError(f"-p no:{name}: there is no such plugin, but {known}")
            self.manager.set_blocked(name)
        for name, module in BUILTIN.items():
            load = partial(importlib.import_module, module)
            self.add(name, load, DIST, __version__)
        disabled = os.environ.get("MLX_LM_EXT_DISABLE_AUTOLOAD", "0")
        if autoload and disabled in ("", "0"):
            # All of them: ``named`` lacks one if two distributions use the same name.
            for entry in entries:
                self.add_entry_point(entry)
        for name in wanted:
            if name not in named:
                self.add_module(name)
            elif not self.manager.has_plugin(name):
                self.add_entry_point(named[name])

    def add_entry_point(self, entry: EntryPoint) -> None:
        assert entry.dist is not None  # those of ``entry_points`` have one
        self.add(entry.name, entry.load, entry.dist.name, entry.dist.version)

    def add_module(self, name: str) -> None:
        if "" not in sys.path and os.getcwd() not in sys.path:
            # For a console script, Python puts the script's folder there instead.
            sys.path.append(os.getcwd())
        self.add(name, partial(importlib.import_module, name), "loaded with -p", "")

    def add(
        self, name: str, load: Callable[[], Any], distribution: str, version: str
    ) -> None:
        """Load a plugin and check its hooks, unless the plugin is blocked."""
        if self.manager.is_blocked(name):
            return
        label = plugin_label(name, distribution, version)
        if self.manager.has_plugin(name):
            raise PluginError(f"{label}: {self.label(name)} has the same name")
        try:
            plugin = load()
            self.sources[name] = distribution, version
            if self.manager.is_registered(plugin):
                return
            self.manager.register(plugin, name)
            self.manager.check_pending()
        except PluginValidationError as e:
            raise PluginError(f"{label}: {' '.join(str(e).split())}")
        except PluginError as e:
            raise PluginError(f"{label}: {e}")
        except (Exception, SystemExit) as e:
            raise PluginError(f"{label} cannot be loaded: {one_line(e)}")

    def label(self, name: str) -> str:
        """What messages call a plugin."""
        return plugin_label(name, *self.sources[name])

    def each(
        self, hook: str, **arguments: Any
    ) -> Iterator[Tuple[str, Callable[[], Any]]]:
        """For each plugin that has ``hook``, in the order in which pluggy calls them: its
        label, and its function with those of the arguments that it takes."""
        for impl in reversed(getattr(self.manager.hook, hook).get_hookimpls()):
            values = [arguments[name] for name in impl.argnames]
            yield self.label(impl.plugin_name), partial(impl.function, *values)

    def start_each(self, hook: str, **arguments: Any) -> Iterator[Tuple[str, Any]]:
        """The label and the result of each plugin that has ``hook``.

        Raises:
            PluginError: If one raises.
        """
        for label, call in self.each(hook, **arguments):
            try:
                result = call()
            except (Exception, SystemExit) as e:
                raise PluginError(f"{label}: {hook}: {one_line(e)}")
            yield label, result

    def add_arguments(self, parser: Any) -> None:
        """Let plugins add their flags."""
        for _ in self.start_each("mlx_lm_add_arguments", parser=parser):
            pass

    def registered(self, kind: PolicyKind) -> Dict[str, Registered]:
        """The classes of a kind by name.

        Raises:
            PluginError: If a class breaks the contract, or two have the same name.
        """
        found: Dict[str, Registered] = {}
        for label, classes in self.start_each(kind.hook):
            if not isinstance(classes, (list, tuple)):
                raise PluginError(f"{label}: {kind.hook} must return a list of classes")
            for cls in classes:
                if reason := objection(kind, cls):
                    raise PluginError(f"{label}: {reason}")
                if cls.name in found:
                    raise PluginError(
                        f"{label}: the {kind.title} {cls.name!r} is also one of "
                        f"{found[cls.name].plugin}"
                    )
                found[cls.name] = Registered(cls, label)
        return dict(sorted(found.items()))

    def routes(self, args: Any) -> Dict[Tuple[str, str], RegisteredRoute]:
        """The routes of all plugins by method and path.

        Args:
            args (argparse.Namespace): The command line.

        Raises:
            PluginError: If a route breaks the contract, or two have one place.
        """
        hook = "mlx_lm_register_routes"
        found: Dict[Tuple[str, str], RegisteredRoute] = {}
        for label, routes in self.start_each(hook, args=args):
            if not isinstance(routes, (list, tuple)):
                raise PluginError(f"{label}: {hook} must return a list of routes")
            for route in routes:
                if reason := objection_to_route(route):
                    raise PluginError(f"{label}: {reason}")
                place = route.method, route.path
                if place in found:
                    raise PluginError(
                        f"{label}: {' '.join(place)} is also a route of "
                        f"{found[place].plugin}"
                    )
                found[place] = RegisteredRoute(route, label)
        return found

    def hint(self, kind: PolicyKind, name: str) -> str:
        """For a message that no class of a kind is called ``name``: which plugin defines
        such a class and does not register it. Empty if none does."""
        for plugin_name, plugin in self.manager.list_name_plugin():
            for cls in vars(plugin).values() if plugin is not None else ():
                if (
                    inspect.isclass(cls)
                    and issubclass(cls, kind.interface)
                    and getattr(cls, "name", None) == name
                ):
                    return (
                        f"; {self.label(plugin_name)} defines the class {cls.__name__}, "
                        f"and its {kind.hook} does not return it"
                    )
        return ""

    def describe(self, args: Any) -> str:
        """A paragraph for each plugin: its origin, its hooks, what it registers.

        Args:
            args (argparse.Namespace): The command line.
        """
        names: Dict[str, List[str]] = {}
        for kind in KINDS:
            for name, (_, label) in self.registered(kind).items():
                names.setdefault(label, []).append(f"{kind.flag} {name}")
        for place, (_, label) in self.routes(args).items():
            names.setdefault(label, []).append(" ".join(place))
        lines = []
        for name, plugin in self.manager.list_name_plugin():
            if plugin is None:
                lines.append(f"{name}: blocked")
                continue
            hooks = sorted(h.name for h in self.manager.get_hookcallers(plugin) or ())
            lines.append(self.label(name))
            lines.append(f"  hooks: {', '.join(hooks) or 'none'}")
            if label_names := names.get(self.label(name)):
                lines.append(f"  registers: {', '.join(label_names)}")
        return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """The type and the message of what a plugin raised."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def plugin_label(name: str, distribution: str, version: str) -> str:
    return f"plugin {name!r} ({f'{distribution} {version}'.strip()})"


def objection(kind: PolicyKind, cls: Any) -> str:
    """What is wrong with a class that was registered; empty if nothing is."""
    interface = kind.interface.__name__
    if not (inspect.isclass(cls) and issubclass(cls, kind.interface)):
        return f"{cls!r} does not derive from mlx_lm_ext.interfaces.{interface}"
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        return f"the {kind.title} {cls.__name__} has no name"
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        return f"the {kind.title} {name!r} lacks the method {', '.join(missing)}"
    return ""


def objection_to_route(route: Any) -> str:
    """What is wrong with a route that was registered; empty if nothing is."""
    if not isinstance(route, Route):
        return f"{route!r} is not a mlx_lm_ext.routes.Route"
    if route.method not in ("GET", "POST"):
        return f"the route {route.path} takes {route.method!r}, not GET or POST"
    if not ROUTE.fullmatch(route.path):
        return f"the path {route.path!r} of a route must be like /name/name"
    path = route.path.removeprefix("/v1")
    is_model = route.method == "GET" and path.startswith(f"{MODELS}/")
    if path in METHODS or is_model:
        return f"{route.path} is a route of the server itself"
    if not callable(route.function):
        return f"the function of the route {route.path} cannot be called"
    return ""
