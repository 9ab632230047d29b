"""CUDA graphs over one or several devices.

One graph holds the kernels of all devices. It is launched on the first; the streams of the others
take part by waiting for its stream, when the graph is recorded and when it runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import Tensor

WARM_UP_RUNS = 2
"""Runs before recording: kernels are compiled and libraries set up while that is allowed."""


class Recording:
    """What a function runs, recorded.

    Args:
        run: runs the same kernels on the same addresses whenever it is called.
        devices: CUDA devices that these run on, the first of which is where it returns its result.

    Attributes:
        result: what the function returned; each replay overwrites it.

    Raises:
        RuntimeError: if the function does what cannot be recorded (such as waiting for a device),
            or memory runs out.
    """

    def __init__(self, run: Callable[[], Tensor], devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._pools = [_pool(device) for device in devices[1:]]
        self._graph = torch.cuda.CUDAGraph()
        streams = [_side_stream(device) for device in devices]
        with _current(streams):
            for _ in range(WARM_UP_RUNS):
                run()
            self.result = self._record(run, streams)

    def replay(self) -> None:
        """Run it again, behind what is on the devices' current streams and in front of the rest."""
        first, *others = map(torch.cuda.current_stream, self._devices)
        for stream in others:
            first.wait_stream(stream)
        self._graph.replay()
        for stream in others:
            stream.wait_stream(first)

    def _record(self, run: Callable[[], Tensor], streams: Sequence[torch.cuda.Stream]) -> Tensor:
        first, *others = streams
        generator = torch.cuda.default_generators[first.device_index]
        state = generator.clone_state()
        try:
            with (
                torch.cuda.graph(self._graph, stream=first, capture_error_mode="thread_local"),
                ExitStack() as others_too,
            ):
                for stream, pool in zip(others, self._pools, strict=True):
                    others_too.enter_context(torch.cuda.use_mem_pool(pool, stream.device))
                    stream.wait_stream(first)  # which makes it a part of what is recorded
                    others_too.callback(first.wait_stream, stream)  # or recording could not end
                return run()
        except BaseException:
            generator.graphsafe_set_state(state)  # which a recording that fails leaves unusable
            raise


@contextmanager
def _current(streams: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    """Work on these streams, each on its own device, behind and in front of what others do."""
    usual = [torch.cuda.current_stream(stream.device) for stream in streams]
    for stream, before in zip(streams, usual, strict=True):
        stream.wait_stream(before)
    try:
        with ExitStack() as stack:
            for stream in reversed(streams):  # the first one's device is the current one
                stack.enter_context(torch.cuda.stream(stream))
            yield
    finally:
        for stream, behind in zip(streams, usual, strict=True):
            behind.wait_stream(stream)


def _pool(device: torch.device) -> torch.cuda.MemPool:
    """Memory of a device that is a graph's own."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to record on; libraries keep memory for every stream that they have seen."""
    return torch.cuda.Stream(device)
