"""Timing: medians of calls, ratios of calls in turn, and limits of the machine."""

import statistics
import time

import torch

DEVICE = str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
"""The device that the trainers use."""


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


class Deadline:
    """A time after which no new work starts."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes

    def left(self):
        """Seconds, at least 1."""
        return max(1.0, self.end - time.monotonic())

    def passed(self):
        return time.monotonic() > self.end


def median_ms(function, device, seconds=0.2):
    """Median time of a call in ms over `seconds` of calls after a warm-up.

    On a GPU the cache is cleared before each call and the device's events are read.
    """
    if torch.device(device).type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=50, rep=1000 * seconds, return_mode="median")
    function()
    times = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def graph_ms(make, seconds=0.2):
    """Median time of a call on the GPU alone in ms: calls replayed from one CUDA graph.

    A replay launches nothing from Python; what `median_ms` reads above this is the host's work. The
    cache is not cleared between calls.

    Args:
        make: Returns the function to measure. It runs on the stream of the capture, because a
            backward pass runs on the streams of its leaves and of its forward pass.
        seconds: Of calls, in ten replays.

    Raises:
        RuntimeError: If CUDA cannot capture a call, for example because it waits for the device.
    """
    from triton.testing import do_bench_cudagraph

    capture = torch.cuda.graph
    stream = capture.default_capture_stream = capture.default_capture_stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = make()
        function()
    torch.cuda.synchronize()
    return do_bench_cudagraph(function, rep=1000 * seconds / 10, return_mode="median")


def in_turn(functions, rounds, device, warm_up=2, deadline=None, rotate=False):
    """Call all functions in turn, `rounds` times: {name: seconds of each counted round}.

    Stops early, after at least one counted round, when the deadline passes. With `rotate` the
    function that starts a round changes: the one after a large model finds other memory than the
    rest.
    """
    times = {name: [] for name in functions}
    order = list(functions)
    for i in range(warm_up + rounds):
        if deadline is not None and deadline.passed() and i > warm_up:
            break
        for name in order:
            wait(device)
            start = time.perf_counter()
            functions[name]()
            wait(device)
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
        if rotate:
            order = order[1:] + order[:1]
    return times


def ratio_of(times, base):
    """Median of the ratios within rounds: a machine that slows down slows a whole round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def paired(functions, rounds, device, **options):
    """{name: (median seconds, median ratio to the first function)}, as measured by `in_turn`."""
    times = in_turn(functions, rounds, device, **options)
    first = next(iter(times.values()))
    return {name: (statistics.median(own), ratio_of(own, first)) for name, own in times.items()}


def training_step(model, loss, lr=1e-4, clip=False, optimizer=None):
    """A function that runs one training step: `loss()`, backward and the optimizer.

    Args:
        model: The network whose parameters are trained.
        loss: Function that returns the loss of one batch.
        lr: Learning rate of AdamW.
        clip: Whether gradient norms are clipped at 1.
        optimizer: The optimizer; default: AdamW.
    """
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def step():
        loss().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def profile_of(step, device, steps=3, operations=25):
    """The operations of some steps by their own time, as a table of torch's profiler."""
    for _ in range(steps):
        step()
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            step()
    on = "cuda" if torch.device(device).type == "cuda" else "cpu"
    return profile.key_averages().table(sort_by=f"self_{on}_time_total", row_limit=operations)


def copy_gbs(device, megabytes):
    """GB/s of a plain copy, counting bytes read and written."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device) / 1e6


def matmul_tflops(device, size, dtype):
    """TFLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, device) / 1e9
