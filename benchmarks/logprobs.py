"""Compare fused logprobs, which never hold all logits, with the plain way: peak memory and time, forward and backward.

    python -m benchmarks.logprobs [--tokens 1024 2048 8192] [--vocabulary 151936] [--hidden 896] [--pairs 3]

The plain way is `log_softmax(hidden @ weight.T)` with autograd. Memory is measured in a separate process for each case:
the peak resident size minus the size before the first forward, minus the gradients that both ways must produce (of the
hidden states and of the weight). Above --plain-limit tokens, the plain way is extrapolated from the two largest
measured cases. Times are measured in one process, alternating between both ways. The last line is one JSON object with
the figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch

from benchmarks.result import print_result
from grpo.objective.logprobs import selected_logprobs

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return selected_logprobs(hidden[None], weight, None, targets[None], temperature=1.0, float32_head=False)[0]


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(hidden @ weight.t(), -1).gather(-1, targets[:, None])


WAYS: dict[str, Way] = {"fused": fused, "plain": plain}


def inputs(tokens: int, hidden: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden) * 0.02).requires_grad_()
    return states, weight, torch.randint(vocabulary, (tokens,))


def peak(way: str, tokens: int, hidden: int, vocabulary: int) -> float:
    """Return the MiB that forward and backward need in addition to the inputs and their gradients."""
    states, weight, targets = inputs(tokens, hidden, vocabulary)
    before = psutil.Process().memory_info().rss
    WAYS[way](states, weight, targets).sum().backward()
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (highest - before - 4 * (states.numel() + weight.numel())) / 2**20


def pairs(tokens: int, hidden: int, vocabulary: int, count: int) -> tuple[list[float], list[float]]:
    """Return the seconds of the fused and of the plain way, measured alternately."""
    states, weight, targets = inputs(tokens, hidden, vocabulary)
    times: dict[str, list[float]] = {"fused": [], "plain": []}
    for number in range(count + 1):
        for name, way in WAYS.items():
            states.grad = weight.grad = None
            started = time.perf_counter()
            way(states, weight, targets).sum().backward()
            if number:  # the first pair warms up
                times[name].append(time.perf_counter() - started)
    return times["fused"], times["plain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 8192])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--plain-limit", type=int, default=2048)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(peak(a.measure[0], int(a.measure[1]), a.hidden, a.vocabulary)))
        return
    print(f"vocabulary {a.vocabulary}, hidden {a.hidden}, float32, {torch.get_num_threads()} threads")
    found: dict[str, dict[int, float]] = {"fused": {}, "plain": {}}
    sizes = ["--vocabulary", str(a.vocabulary), "--hidden", str(a.hidden)]
    for tokens in a.tokens:
        for way in WAYS:
            if way == "plain" and tokens > a.plain_limit:
                continue
            command = [sys.executable, "-m", "benchmarks.logprobs", *sizes, "--measure", way, str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way][tokens] = json.loads(done.stdout)
            print(f"{tokens:6} tokens, {way}: {found[way][tokens]:8.0f} MiB", flush=True)
    known = sorted(found["plain"])
    extrapolated: dict[int, float] = {}
    for tokens in a.tokens:
        if tokens > a.plain_limit and len(known) > 1:
            slope = (found["plain"][known[-1]] - found["plain"][known[-2]]) / (known[-1] - known[-2])
            extrapolated[tokens] = found["plain"][known[-1]] + slope * (tokens - known[-1])
            print(f"{tokens:6} tokens, plain: {extrapolated[tokens]:8.0f} MiB (extrapolated)")
    spread = max(found["fused"].values()) / min(found["fused"].values())
    print(f"fused, most over least memory: {spread:.3f}")
    ours, theirs = pairs(min(a.tokens), a.hidden, a.vocabulary, a.pairs)
    ratios = sorted(x / y for x, y in zip(ours, theirs, strict=True))
    mine, its = statistics.median(ours), statistics.median(theirs)
    print(f"time at {min(a.tokens)} tokens: fused {mine:.2f} s, plain {its:.2f} s")
    print(f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    print_result(
        "logprobs",
        vocabulary=a.vocabulary,
        hidden=a.hidden,
        dtype="float32",
        threads=torch.get_num_threads(),
        memory=[
            {
                "tokens": tokens,
                "fused_mib": found["fused"][tokens],
                "plain_mib": found["plain"].get(tokens),
                "plain_extrapolated_mib": extrapolated.get(tokens),
            }
            for tokens in a.tokens
        ],
        fused_most_over_least=spread,
        timed_tokens=min(a.tokens),
        pairs=a.pairs,
        fused_s=mine,
        plain_s=its,
        ratio=statistics.median(ratios),
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
    )


if __name__ == "__main__":
    main()
