"""The plugins that are part of this package. No module imports them: they are loaded by name,
as any plugin is."""
