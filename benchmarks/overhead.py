"""Compare the time of a whole step with its floor: bare vLLM on the same requests plus bare torch on the same tokens.

    python -m benchmarks.overhead [--steps 15] [--recipe recipes/arithmetic_cpu.yaml] [--microbatch-tokens N ...]
        [section.option=value ...]

Runs the recipe's own loop at learning rate 0, so that all steps sample from the same weights. After each step, with all
engines still loaded, the two floors are timed on the same requests and rows in the same process tree:

    bare vLLM    add_request/step on the step's prompts, settings and seeds, FINAL_ONLY, detokenize off, logprobs 0
    bare torch   forward, loss, backward, AdamW on the step's rows, sorted by length, at the best of three token budgets
                 per microbatch; the vocabulary projection only at completion tokens, at most 256 MiB of logits at once;
                 with the reference's forward if kl_coef > 0, with gradient checkpointing if the recipe has it

Each floor runs in a separate process with the threads of the recipe's engines. Prints the medians and the ratio. The
last line is one JSON object with the figures. The budgets are a quarter, half and all of the recipe's
learner.tokens_per_microbatch; `--microbatch-tokens` sets others.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from torch.nn.functional import pad

from benchmarks.result import Figure, print_result
from grpo import config, driver
from grpo.checks import check
from grpo.cluster import actors
from grpo.cluster import engines as engine_group
from grpo.cluster import session as cluster
from grpo.cluster.environment import learner_environment, sampler_environment
from grpo.config import Config
from grpo.metrics.health import Health
from grpo.rewards.pool import RewardPool
from grpo.run.folder import RunFolder
from grpo.run.progress import Progress
from grpo.run.saving import Saver
from grpo.run.timeline import Timeline
from grpo.sampler.settings import train_settings
from grpo.types import Batch, RankStep, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PARTS = ("sample_s", "reward_s", "batch_s", "update_s", "sync_s")
"""Parts of a step's time, which the run logs as time/<name>."""

MEASURED = ("step_s", *PARTS, "bare_vllm_s", "bare_torch_s")


class BareSampler:
    """Plain vLLM, used as in its documentation."""

    def __init__(self, c: Config) -> None:
        """Load an engine with the recipe's limits and the same memory for the KV cache as the recipe's sampler."""
        from vllm import EngineArgs, LLMEngine

        memory: dict[str, Any] = {}
        if not c.on_gpu or c.sampler.kv_cache_gib is not None:
            memory["kv_cache_memory_bytes"] = int((c.sampler.kv_cache_gib or 0.25) * 2**30)
        if c.on_gpu:
            memory["gpu_memory_utilization"] = c.sampler.gpu_memory_utilization
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=c.model.path,
                skip_tokenizer_init=True,
                dtype=c.model.dtype,
                max_model_len=c.max_row_tokens,
                max_num_seqs=c.sampler.max_num_seqs,
                max_num_batched_tokens=max(8192, c.max_row_tokens),
                enforce_eager=c.enforce_eager,
                enable_prefix_caching=c.sampler.prefix_caching,
                enable_chunked_prefill=c.on_gpu,
                distributed_executor_backend="uni",
                disable_log_stats=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                **memory,
            )
        )

    def run(self, requests: Sequence[SampleRequest], s: SamplingSettings) -> tuple[float, dict[str, list[int]]]:
        """Sample `requests`. Return the seconds, and `<request>/<sample>` -> token ids of each completion."""
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
    """A plain training loop with transformers and torch's AdamW."""

    def __init__(self, c: Config, budgets: Sequence[int], chunk_bytes: int = 2**28) -> None:
        """`budgets`: tokens per microbatch to try. `chunk_bytes`: bound on the float32 logits computed at once."""
        from transformers import AutoModelForCausalLM

        def load() -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(c.model.path, dtype=getattr(torch, c.model.dtype))

        self.config, self.budgets = c, budgets
        self.model = load()
        if c.learner.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.train()
        self.reference = load().eval() if c.algorithm.kl_coef > 0 else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.chunk = max(1, chunk_bytes // (4 * self.model.get_output_embeddings().weight.shape[0]))

    def run(self, step: RankStep) -> dict[int, float]:
        """Time the step's optimizer steps at each budget. Return tokens per microbatch -> seconds."""
        seconds = {}
        for tokens in self.budgets:
            started = time.perf_counter()
            for minibatch in step.minibatches * step.epochs:
                self.gradient(minibatch, tokens)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            seconds[tokens] = time.perf_counter() - started
        return seconds

    def gradient(self, minibatch: Sequence[Batch], tokens: int) -> None:
        """Add the gradient of a minibatch to the parameters' `.grad`, in microbatches of at most `tokens` tokens.

        The vocabulary projection is computed only for tokens with a weight, one chunk of positions at a time. Each
        chunk is backpropagated to its hidden states before the next one, and the rest of the model once at the end.
        """
        for ids, targets, advantages, weights in microbatches(minibatch, tokens):
            at = weights.flatten().nonzero()[:, 0]
            hidden = self.hidden(self.model, ids, at)
            leaves = [part.detach().requires_grad_() for part in hidden.split(self.chunk)]
            fixed = [x.flatten()[at].split(self.chunk) for x in (targets, advantages, weights)]
            with torch.no_grad():
                ref = self.hidden(self.reference, ids, at).split(self.chunk) if self.reference else [None] * len(leaves)
            for leaf, ref_leaf, *others in zip(leaves, ref, *fixed, strict=True):
                self.loss(leaf, ref_leaf, *others).backward()
            hidden.backward(torch.cat([leaf.grad for leaf in leaves]))

    def hidden(self, model: PreTrainedModel, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [N,H] of `ids` [B,T] at the flat positions `at` [N]."""
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).index_select(0, at)

    def logprobs(self, model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return log softmax(head(hidden [N,H]) / temperature) at `targets` [N], in nats: [N] float32."""
        logits = model.get_output_embeddings()(hidden).float() / self.config.sampling.temperature
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    def loss(
        self,
        hidden: torch.Tensor,
        ref_hidden: torch.Tensor | None,
        targets: torch.Tensor,
        advantages: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted sum of the policy loss over N positions, with the k3 KL if there is a reference."""
        logprobs = self.logprobs(self.model, hidden, targets)
        loss = -torch.exp(logprobs - logprobs.detach()) * advantages
        if ref_hidden is not None:
            with torch.no_grad():
                ref = self.logprobs(self.reference, ref_hidden, targets)
            loss = loss + self.config.algorithm.kl_coef * (torch.expm1(ref - logprobs) - (ref - logprobs))
        return (loss * weights).sum()


def microbatches(minibatch: Sequence[Batch], tokens: int) -> Iterator[list[torch.Tensor]]:
    """Yield the rows of a minibatch, longest first, in parts of at most `tokens` tokens including padding.

    A part is input_ids, target_ids, advantages and token_weights, [B,T] each. Rows in which no token has a weight are
    omitted.
    """
    width = max(batch.input_ids.shape[1] for batch in minibatch)
    ids, targets, advantages, weights = (
        torch.cat([pad(getattr(b, name), (0, width - b.input_ids.shape[1])) for b in minibatch])
        for name in ("input_ids", "target_ids", "advantages", "token_weights")
    )
    lengths, order = ((weights != 0) * torch.arange(1, width + 1)).amax(1).sort(descending=True)
    start, end = 0, int((lengths > 0).sum())
    while start < end:
        longest = int(lengths[start])
        part = order[start : min(end, start + max(1, tokens // longest))]
        yield [x[part, :longest] for x in (ids, targets, advantages, weights)]
        start += len(part)


class Recorded:
    """The engines, with a record of the last step's requests, tokens and rows."""

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
        best = min(torch_s, key=lambda tokens: torch_s[tokens])
        row = {"step_s": whole, "bare_vllm_s": vllm, "bare_torch_s": torch_s[best], "microbatch_tokens": best}
        row |= {name: metrics[f"time/{name}"] for name in PARTS}
        self.rows.append(row)
        print(
            f"step {step}: {whole:.3f} s; bare vLLM {vllm:.3f} + bare torch {torch_s[best]:.3f} "
            f"(microbatches of {best} tokens) -> ratio {whole / (vllm + torch_s[best]):.3f}",
            flush=True,
        )
        self.since = time.perf_counter()

    def say(self, text: str) -> None:
        self.since = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/arithmetic_cpu.yaml"))
    parser.add_argument("--steps", type=int, default=15, help="counted steps, after three that warm up")
    parser.add_argument("--microbatch-tokens", type=int, nargs="+", help="budgets that bare torch tries")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    fixed = [
        f"run.steps={arguments.steps + 3}",
        "optimizer.lr=0",
        "cluster.learner_ranks=1",
        "run.verify_every=0",
        "run.save_last=false",
    ]
    loaded = config.load(arguments.recipe, [*arguments.overrides, *fixed])
    c = check.resolve_paths(loaded)
    with tempfile.TemporaryDirectory(prefix="grpo-bench-") as scratch:
        folder = Path(scratch)
        plan = check.check(c, arguments.recipe, folder)
        settings = train_settings(c, plan.end_token_ids)
        with (
            RewardPool(c.rewards, files=plan.reward_files, workers=os.cpu_count() or 1, log_dir=folder) as scorer,
            cluster.session(c, folder),
        ):
            engines = Recorded(engine_group.Engines(c, folder, print, Timeline(None)))
            own = c.learner.tokens_per_microbatch
            budgets = arguments.microbatch_tokens or [max(1, own // 4), max(1, own // 2), own]
            bare = [
                ray.remote(cls).options(num_cpus=0, runtime_env={"env_vars": environment}).remote(c, *others)
                for cls, environment, others in (
                    (BareSampler, sampler_environment(c), ()),
                    (BareLearner, learner_environment(c, 0), (budgets,)),
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
                saver=Saver(c, run.path, engines=engines.state, fingerprints=dict, flush=lambda: None, say=print),
                health=Health(c),
            )  # fmt: skip
            actors.freeze_garbage()
            driver.train(loop)
            run.close()
            engines.close()
    report(pairing.rows[3:], recipe=str(arguments.recipe), model=loaded.model.path, overrides=arguments.overrides)


def report(rows: Sequence[Mapping[str, float]], **about: Figure) -> None:
    """Print medians over the steps and of the steps' ratios, then one JSON object with them and `about`."""
    medians = {name: statistics.median(row[name] for row in rows) for name in MEASURED}
    ratios = sorted(row["step_s"] / (row["bare_vllm_s"] + row["bare_torch_s"]) for row in rows)
    middle = statistics.median(ratios)
    print(f"\nmedians of {len(rows)} steps, seconds")
    for name, seconds in medians.items():
        print(f"  {name:12} {seconds:.3f}")
    print(f"ratio step / (bare vLLM + bare torch): median {middle:.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}")
    print_result(
        "overhead",
        **about,
        steps=len(rows),
        **medians,
        bare_torch_microbatch_tokens=statistics.mode(row["microbatch_tokens"] for row in rows),
        ratio=middle,
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
    )


if __name__ == "__main__":
    main()
