"""Compare the time of `grpo eval` and of bare vLLM on the same requests.

    python -m benchmarks.evaluation MODEL --data ../shared/data/gsm8k_test.jsonl [--pairs 3] [section.option=value ...]

Both run alternately in one process tree with warm engines. For `grpo eval` the time from the first request to the
written result is measured (sampling, decoding, grading, files), for vLLM only add_request/step. Prints each pair and
the median ratio. The last line is one JSON object with the figures. The bar for the ratio is 1.15.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import ray

from benchmarks.overhead import BareSampler
from benchmarks.result import Figure, print_result
from grpo import config
from grpo.checks import check
from grpo.cluster import engines
from grpo.cluster import session as cluster
from grpo.cluster.environment import sampler_environment
from grpo.lifecycle import evaluation_folder as evaluating
from grpo.rewards.pool import RewardPool
from grpo.rollout.collect import eval_seed
from grpo.run.timeline import Timeline
from grpo.sampler.settings import eval_settings
from grpo.types import SampleRequest

BAR = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--reward", default="reward_fns/gsm8k.py")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    parsed = parser.parse_intermixed_args()
    c = check.resolve_paths(
        config.load_for_evaluation(
            None, model=parsed.model, data=[parsed.data], rewards=[parsed.reward], overrides=parsed.overrides
        )
    )
    with tempfile.TemporaryDirectory(prefix="grpo-bench-") as scratch:
        folder = Path(scratch)
        plan = check.check_evaluation(c, Path("."), folder)
        with (
            RewardPool(c.rewards, files=plan.reward_files, workers=2, log_dir=folder) as scorer,
            cluster.session(c, folder),
        ):
            group = engines.Engines(c, folder, print, Timeline(None))
            environment = sampler_environment(c)
            bare = ray.remote(BareSampler).options(num_cpus=0, runtime_env={"env_vars": environment}).remote(c)
            settings = eval_settings(c, plan.end_token_ids)
            requests = [
                SampleRequest(
                    index=i,
                    token_ids=prompt.token_ids,
                    seeds=tuple(eval_seed(c, prompt, k) for k in range(c.data.eval.samples_of(prompt.dataset))),
                )
                for i, prompt in enumerate(plan.eval_prompts)
            ]
            pairs: list[tuple[float, float]] = []
            for pair in range(parsed.pairs + 1):
                vllm, tokens = ray.get(bare.run.remote(requests, settings))
                target = folder / f"pair-{pair}"
                key = evaluating.key_of(plan, "")
                with evaluating.opened(target, key, plan):
                    started = time.perf_counter()
                    left = evaluating.unfinished(plan, target, print)
                    evaluating.evaluate(plan, target, left, group, scorer, lambda text: None)
                    ours = time.perf_counter() - started
                shutil.rmtree(target)
                sampled = sum(map(len, tokens.values()))
                said = f"{len(requests)} prompts, {sampled} tokens: grpo eval {ours:.2f} s, bare vLLM {vllm:.2f} s"
                if pair:  # the first one warms up
                    pairs.append((ours, vllm))
                    print(f"{said}, ratio {ours / vllm:.3f}", flush=True)
            group.close()
    report(pairs, model=parsed.model, data=parsed.data, prompts=len(requests), tokens=sampled)


def report(pairs: Sequence[tuple[float, float]], **about: Figure) -> None:
    """Print the median ratio of `pairs` (seconds of grpo eval and of bare vLLM), then a JSON object with `about`."""
    ratios = sorted(ours / vllm for ours, vllm in pairs)
    print(f"median ratio {statistics.median(ratios):.3f} (bar {BAR})")
    print_result(
        "evaluation",
        **about,
        pairs=len(pairs),
        grpo_eval_s=statistics.median(ours for ours, _ in pairs),
        bare_vllm_s=statistics.median(vllm for _, vllm in pairs),
        ratio=statistics.median(ratios),
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
        bar=BAR,
    )


if __name__ == "__main__":
    main()
