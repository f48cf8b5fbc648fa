"""Time on a CUDA device: medians of graph replays, and the memory bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM = 3
REPLAYS = 20
COPY_BYTES = 2 << 30


def replay_us(work: Callable[[], object], calls: int) -> float:
    """Returns the microseconds of one of the `calls` calls in `work`: the median of many replays of its CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    times = []
    for number in range(WARM + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= WARM:
            times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times) / calls


def bytes_per_us() -> float:
    """Returns the bytes per microsecond of the device's memory, read plus written, measured by a large copy."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / replay_us(lambda: target.copy_(source), 1)


def l2_bytes() -> int:
    """Returns the bytes of the device's L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
