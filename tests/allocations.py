"""What torch's allocator hands out and is given back, in which no library and no heap has part."""

import torch
from torch.profiler import ProfilerActivity, profile


class Allocations:
    """Within the block, memory on the CPU is watched; then `bytes` is the most that was held of what was taken in it."""

    def __enter__(self):
        self.profiler = profile(profile_memory=True, activities=[ProfilerActivity.CPU])
        self.profiler.start()
        return self

    def __exit__(self, *_exception):
        self.profiler.stop()
        found = [event for event in self.profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = torch.tensor([event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())])
        self.bytes = int(held.cumsum(0).max())
