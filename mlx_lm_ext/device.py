"""What MLX runs on."""

import os

import mlx.core as mx


def on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def device_memory() -> int:
    """Bytes that MLX may use: those of the GPU, or of the machine."""
    info = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if name in info:
            return int(info[name])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def give_back_freed() -> None:
    """Give freed memory back to the device, unless it is little beside what is in use:
    a server that runs short prompts would only have to ask for it again."""
    if mx.get_cache_memory() > mx.get_active_memory() // 4:
        mx.clear_cache()
