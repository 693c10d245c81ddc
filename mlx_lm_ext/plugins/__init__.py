"""What is built in and registers itself as any plugin does. Nothing imports this room: its
modules are loaded by name."""
