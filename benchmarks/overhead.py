"""A whole step against its floor: bare vLLM on the same requests plus bare torch on the same tokens.

    python -m benchmarks.overhead [--steps 15] [--recipe recipes/arithmetic_cpu.yaml] [section.option=value ...]

Runs the recipe's own loop at learning rate 0, so that every step samples from the same weights. After each step, with
everything still loaded, the two floors are timed on what that very step did, in the same process tree:

    bare vLLM    add_request/step on the step's prompts, settings and seeds, FINAL_ONLY, detokenize off, logprobs 0
    bare torch   forward, loss, backward, AdamW on the step's rows, at the best of three microbatch sizes;
                 with the reference's forward where kl_coef > 0

Both run in processes of their own with the threads of the recipe's engines. Prints medians, the ratio and its parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from grpo import actors, check, cluster, config, driver
from grpo import engines as engine_group
from grpo.config import Config
from grpo.progress import Progress
from grpo.rewards.pool import RewardPool
from grpo.run_folder import RunFolder
from grpo.saving import Saver
from grpo.timeline import Timeline
from grpo.types import RankStep, SampleRequest, SamplingSettings


class BareSampler:
    """vLLM as its documentation shows it, and nothing else."""

    def __init__(self, c: Config) -> None:
        from vllm import EngineArgs, LLMEngine

        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=c.model.path,
                skip_tokenizer_init=True,
                dtype=c.model.dtype,
                max_model_len=c.max_row_tokens,
                max_num_seqs=c.sampler.max_num_seqs,
                max_num_batched_tokens=max(8192, c.max_row_tokens),
                enforce_eager=c.sampler.enforce_eager,
                enable_prefix_caching=c.sampler.prefix_caching,
                enable_chunked_prefill=c.on_gpu,
                distributed_executor_backend="uni",
                kv_cache_memory_bytes=2**28,
                disable_log_stats=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
            )
        )

    def run(self, requests: Sequence[SampleRequest], s: SamplingSettings) -> tuple[float, dict[str, list[int]]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        tokens: dict[str, list[int]] = {}
        started = time.perf_counter()
        for request in requests:
            for i, seed in enumerate(request.seeds):
                params = SamplingParams(
                    temperature=s.temperature,
                    max_tokens=s.max_tokens,
                    stop_token_ids=list(s.end_token_ids),
                    ignore_eos=True,
                    seed=seed,
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                prompt = {"prompt_token_ids": list(request.token_ids)}
                self.engine.add_request(f"{request.index}/{i}", prompt, params)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
        seconds = time.perf_counter() - started
        self.engine.reset_prefix_cache()
        return seconds, tokens


class BareLearner:
    """transformers, torch's AdamW and a loop."""

    def __init__(self, c: Config) -> None:
        from transformers import AutoModelForCausalLM

        self.config = c
        dtype = getattr(torch, c.model.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(c.model.path, dtype=dtype)
        self.reference = AutoModelForCausalLM.from_pretrained(c.model.path, dtype=dtype).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def run(self, step: RankStep) -> dict[int, float]:
        """Microbatch size (rows) -> seconds for the step's optimizer steps."""
        seconds = {}
        for size in (128, 256, 512):
            started = time.perf_counter()
            for minibatch in step.minibatches:
                rows = [(b, i) for b in minibatch for i in range(len(b.rollout_index)) if b.rollout_index[i] >= 0]
                self.update(rows, size)
            seconds[size] = time.perf_counter() - started
        return seconds

    def update(self, rows: Sequence[tuple[Any, int]], size: int) -> None:
        def stack(name: str, part: Sequence[tuple[Any, int]]) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([getattr(b, name)[i] for b, i in part], batch_first=True)

        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            ids, targets = stack("input_ids", part), stack("target_ids", part)
            logits = self.model(input_ids=ids, use_cache=False).logits
            logprobs = torch.log_softmax(logits / self.config.sampling.temperature, -1)
            logprobs = logprobs.gather(-1, targets[..., None])[..., 0]
            loss = -(torch.exp(logprobs - logprobs.detach()) * stack("advantages", part) * stack("token_weights", part))
            if self.config.algorithm.kl_coef > 0:
                with torch.no_grad():
                    ref = torch.log_softmax(self.reference(input_ids=ids, use_cache=False).logits, -1)
                    ref = ref.gather(-1, targets[..., None])[..., 0]
                k3 = torch.expm1(ref - logprobs) - (ref - logprobs)
                loss = loss + self.config.algorithm.kl_coef * k3 * stack("token_weights", part)
            loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Recorded:
    """The engines, remembering what the last step was made of."""

    def __init__(self, engines: engine_group.Engines) -> None:
        self._engines = engines
        self.requests: Sequence[SampleRequest] = ()
        self.steps: Sequence[RankStep] = ()
        self.tokens: dict[str, list[int]] = {}

    def sample(self, requests: Sequence[SampleRequest], settings: Any) -> Iterator[Any]:
        self.requests, self.tokens = requests, {}
        for block in self._engines.sample(requests, settings):
            ends = np.cumsum(block.lengths)
            rows = zip(block.index.tolist(), block.sample_index.tolist(), ends - block.lengths, ends, strict=True)
            self.tokens |= {f"{p}/{i}": block.token_ids[start:end].tolist() for p, i, start, end in rows}
            yield block

    def step(self, steps: Sequence[RankStep]) -> Any:
        self.steps = steps
        return self._engines.step(steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)


class Pairing:
    """A reporter that times the floors after every step of the run."""

    def __init__(self, engines: Recorded, sampler: Any, learner: Any, settings: SamplingSettings) -> None:
        self.engines, self.sampler, self.learner, self.settings = engines, sampler, learner, settings
        self.rows: list[dict[str, float]] = []
        self.since = time.perf_counter()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        whole = time.perf_counter() - self.since
        vllm, tokens = ray.get(self.sampler.run.remote(self.engines.requests, self.settings))
        assert tokens == self.engines.tokens, "bare vLLM sampled other tokens"
        torch_s = ray.get(self.learner.run.remote(self.engines.steps[0]))
        best = min(torch_s, key=lambda size: torch_s[size])
        row = {"step": whole, "vllm": vllm, "torch": torch_s[best], "microbatch": float(best)}
        row |= {k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/")}
        self.rows.append(row)
        print(
            f"step {step}: {whole:.3f} s; bare vLLM {vllm:.3f} + bare torch {torch_s[best]:.3f} (microbatch {best}) "
            f"-> ratio {whole / (vllm + torch_s[best]):.3f}",
            flush=True,
        )
        self.since = time.perf_counter()

    def say(self, text: str) -> None:
        self.since = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/arithmetic_cpu.yaml"))
    parser.add_argument("--steps", type=int, default=15, help="counted steps, after three that warm up")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    fixed = [f"run.steps={arguments.steps + 3}", "optimizer.lr=0", "cluster.learner_ranks=1", "run.verify_every=0"]
    c = check.resolve_paths(config.load(arguments.recipe, [*arguments.overrides, *fixed]))
    with tempfile.TemporaryDirectory(prefix="grpo-bench-") as scratch:
        folder = Path(scratch)
        plan = check.check(c, arguments.recipe, folder)
        settings = engine_group.train_settings(c, plan.end_token_ids)
        with (
            RewardPool(c.rewards, files=plan.reward_files, workers=os.cpu_count() or 1, log_dir=folder) as scorer,
            cluster.session(c, folder),
        ):
            engines = Recorded(engine_group.Engines(c, folder, print, Timeline(None)))
            bare = [
                ray.remote(cls).options(num_cpus=0, runtime_env={"env_vars": environment}).remote(c)
                for cls, environment in (
                    (BareSampler, engine_group.sampler_environment(c)),
                    (BareLearner, engine_group.learner_environment(c, 0)),
                )
            ]
            (folder / "run").mkdir()
            run = RunFolder(folder / "run", dataclasses.replace(c, run=dataclasses.replace(c.run, tensorboard=True)))
            pairing = Pairing(engines, *bare, settings)
            loop = driver.Loop(
                config=c, prompts=plan.prompts, eval_prompts=(), engines=engines, scorer=scorer, folder=run,
                reporter=pairing, train_settings=settings, eval_settings=settings,
                decode=lambda ids: plan.tokenizer.batch_decode(ids, skip_special_tokens=True),
                progress=Progress.start(c, plan.prompts), stopping=lambda: False, timeline=Timeline(None),
                saver=Saver(c, run.path, engines=engines, fingerprints=dict, flush=lambda: None, say=print),
            )  # fmt: skip
            actors.freeze_garbage()
            driver.train(loop)
            run.close()
            engines.close()
    report(pairing.rows[3:])


def report(rows: Sequence[Mapping[str, float]]) -> None:
    """Medians over steps, and the ratio pair by pair."""
    print(f"\nmedians of {len(rows)} steps, seconds")
    for name in ("step", "sample_s", "reward_s", "batch_s", "update_s", "sync_s", "vllm", "torch"):
        print(f"  {name:10} {statistics.median(row[name] for row in rows):.3f}")
    ratios = sorted(row["step"] / (row["vllm"] + row["torch"]) for row in rows)
    middle = statistics.median(ratios)
    print(f"ratio step / (bare vLLM + bare torch): median {middle:.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
