"""Finding plugins, and the classes that they register.

Rules:
1. Whatever is wrong with a plugin ends the start, with one line that names the plugin
   and the distribution it came from.
2. What is built in is registered through the same hooks.
"""

import importlib
import inspect
import os
import sys
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple, Type

from pluggy import PluginManager, PluginValidationError

from .. import __version__, hookimpl, hookspecs
from ..interfaces import BatchSampler, EvictionPolicy, SchedulerPolicy

GROUP = "mlx_lm_ext"


class PluginError(Exception):
    """What is wrong with a plugin, in one line."""


class Kind(NamedTuple):
    """A kind of class that plugins register.

    Args:
        title (str): What one is called.
        flag (str): The argument that chooses one by name.
        hook (str): The hook that registers them.
        interface (Type): What they derive from.
        default (str): The built-in one that replaces one that fails.
    """

    title: str
    flag: str
    hook: str
    interface: Type
    default: str


EVICTION = Kind(
    "eviction policy",
    "--eviction-policy",
    "mlx_lm_register_eviction_policies",
    EvictionPolicy,
    "lru",
)
SCHEDULER = Kind(
    "scheduler policy",
    "--scheduler",
    "mlx_lm_register_scheduler_policies",
    SchedulerPolicy,
    "fcfs",
)
SAMPLER = Kind(
    "sampler", "--sampler", "mlx_lm_register_samplers", BatchSampler, "default"
)
KINDS = (EVICTION, SCHEDULER, SAMPLER)


class Registered(NamedTuple):
    """A class, and the plugin that it came from."""

    cls: Type
    plugin: str


class BuiltIn:
    """The built-in policies, imported when they are asked for: samplers import MLX."""

    @hookimpl
    def mlx_lm_register_eviction_policies(self):
        from .eviction import POLICIES

        return POLICIES

    @hookimpl
    def mlx_lm_register_scheduler_policies(self):
        from .scheduling import POLICIES

        return POLICIES

    @hookimpl
    def mlx_lm_register_samplers(self):
        from ..sampling.default import DefaultSampler

        return [DefaultSampler]


class Manager(PluginManager):
    """A plugin manager that finds functions that would be passed over in silence."""

    def parse_hookimpl_opts(self, plugin, name):
        options = super().parse_hookimpl_opts(plugin, name)
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
        options (List[str]): The values of ``-p``: names of modules or entry points to
          load, and ``no:NAME`` to block the plugin NAME.
        autoload (bool): Whether to load those that are installed.

    Raises:
        PluginError: If one cannot be loaded, or is not as ``hookspecs.py`` says.
    """

    def __init__(self, options: List[str] = (), autoload: bool = True):
        self.manager = Manager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.sources: Dict[str, Tuple[str, str]] = {}
        entries = sorted(entry_points(group=GROUP), key=lambda e: e.name)
        named = {e.name: e for e in entries}
        blocked = [o.removeprefix("no:") for o in options if o.startswith("no:")]
        wanted = dict.fromkeys(o for o in options if not o.startswith("no:"))
        for name in blocked:
            if name not in {"builtin", *named, *wanted}:
                known = ", ".join(["builtin", *named])
                raise PluginError(f"-p no:{name}: there is no such plugin, but {known}")
            self.manager.set_blocked(name)
        self.add("builtin", BuiltIn, "mlx-lm-ext", __version__)
        disabled = os.environ.get("MLX_LM_EXT_DISABLE_AUTOLOAD", "0")
        if autoload and disabled in ("", "0"):
            # Not by name: two distributions may have the same.
            for entry in entries:
                self.add_entry_point(entry)
        for name in wanted:
            if name not in named:
                self.add_module(name)
            elif not self.manager.has_plugin(name):
                self.add_entry_point(named[name])

    def add_entry_point(self, entry: EntryPoint) -> None:
        self.add(entry.name, entry.load, entry.dist.name, entry.dist.version)

    def add_module(self, name: str) -> None:
        if "" not in sys.path and os.getcwd() not in sys.path:
            # A console script has its own folder there, not the user's.
            sys.path.append(os.getcwd())
        self.add(name, partial(importlib.import_module, name), "loaded with -p", "")

    def add(
        self, name: str, load: Callable[[], Any], distribution: str, version: str
    ) -> None:
        """Load a plugin and check its hooks, unless it is blocked."""
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
        """A plugin as messages name it."""
        return plugin_label(name, *self.sources[name])

    def each(self, hook: str, **arguments: Any) -> Iterator[Tuple[str, Callable]]:
        """The label of each plugin that has ``hook``, and its function with what it
        takes of the arguments, in the order of pluggy's calls."""
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

    def registered(self, kind: Kind) -> Dict[str, Registered]:
        """The classes of a kind by name."""
        found = {}
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

    def describe(self) -> str:
        """A paragraph for each plugin: where it is from, its hooks, what it registers."""
        names: Dict[str, List[str]] = {}
        for kind in KINDS:
            for name, (_, label) in self.registered(kind).items():
                names.setdefault(label, []).append(f"{kind.flag} {name}")
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


def objection(kind: Kind, cls: Any) -> str:
    """What is wrong with a registered class, or an empty text."""
    interface = kind.interface.__name__
    if not (inspect.isclass(cls) and issubclass(cls, kind.interface)):
        return f"{cls!r} does not derive from mlx_lm_ext.interfaces.{interface}"
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        return f"the {kind.title} {cls.__name__} has no name"
    if missing := sorted(cls.__abstractmethods__):
        return f"the {kind.title} {name!r} lacks the method {', '.join(missing)}"
    return ""
