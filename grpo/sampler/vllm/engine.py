"""The sampler: vLLM in this process, driven step by step.

Takes token ids and returns token ids and logprobs. The engine handles text only if stop strings are configured.
Receives weights in one transaction (`begin_sync`, `load_bucket`, `finish_sync`) and reports the data that verifies it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.sampling_params import RequestOutputKind

from grpo import sockets
from grpo.config import Config
from grpo.sampler.vllm import transfer
from grpo.sampler.vllm.worker import merge_reports
from grpo.suggest import suggest
from grpo.sync.probe import Probe
from grpo.sync.weights import Bucket, SyncReport
from grpo.types import SampledBlock, SampleRequest, SamplingSettings, UserError

RESIDUAL = 0.25
"""Share of a GPU's memory that may be in use while sampler and learner are both offloaded: by their CUDA contexts and
by other processes."""


class Sampler:
    """One vLLM engine. `transport`: see `grpo.sync.transport`."""

    def __init__(self, config: Config, transport: str, index: int) -> None:
        """`index`: this sampler's number within the run. Raises UserError for an unknown `sampler.engine` option."""
        os.environ.setdefault("VLLM_RPC_BASE_PATH", sockets.socket_folder(sockets.VLLM))  # for its workers' sockets
        self._engine = LLMEngine.from_engine_args(engine_arguments(config, transport, index))
        self._engine.collective_rpc("recorder_install")
        self._policy_version = -1
        self._pending_version = -1
        self._asleep = False

    @property
    def policy_version(self) -> int:
        return self._policy_version

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingSettings, flush_s: float
    ) -> Iterator[SampledBlock]:
        """Sample all `requests`. Yield finished completions, at most every `flush_s` seconds."""
        assert not self._engine.has_unfinished_requests()
        for request in requests:
            prompt = {"prompt_token_ids": list(request.token_ids)}
            for i, seed in enumerate(request.seeds):
                self._engine.add_request(f"{request.index}/{i}", prompt, sampling_params(settings, seed))
        done: list[Any] = []
        flushed = time.monotonic()
        while self._engine.has_unfinished_requests():
            done += [output for output in self._engine.step() if output.finished]
            if done and time.monotonic() - flushed > flush_s and self._engine.has_unfinished_requests():
                yield sampled_block(done, self._policy_version)
                done, flushed = [], time.monotonic()
        yield sampled_block(done, self._policy_version)

    def init_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Open the receiving end of the weight transfer. Called once."""
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": dict(init_info)})

    def begin_sync(self, policy_version: int) -> None:
        """Open the transaction. No request may be in flight."""
        assert not self._engine.has_unfinished_requests()
        self._pending_version = policy_version
        self._engine.collective_rpc("start_weight_update")
        self._engine.collective_rpc("recorder_start")

    def load_bucket(self, bucket: Bucket) -> None:
        """Load one bucket through vLLM's transfer engine. Return when the bucket's memory may be reused."""
        self._engine.collective_rpc("update_weights", kwargs={"update_info": dict(bucket.transport)})

    def finish_sync(self, probe: Probe) -> SyncReport:
        """Close the transaction: end the reload, drop all caches, adopt the policy version and measure the probe."""
        self._engine.collective_rpc("finish_weight_update")
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM refused to drop its prefix cache after a weight update")
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()
        self._policy_version = self._pending_version
        loaded = merge_reports(self._engine.collective_rpc("recorder_report"))
        return SyncReport(
            policy_version=self._policy_version,
            consumed=loaded.consumed,
            unfilled_slots=loaded.unfilled,
            unmapped_tensors=loaded.unmapped,
            probe_logprobs=self.probe_logprobs(probe),
        )

    def sleep(self, *, keep_weights: bool) -> float:
        """Free the GPU memory for the learner. The weights are offloaded to host memory, or dropped if new ones follow.

        Returns the GiB of GPU memory still in use by any process; 0 on CPU, and if the sampler is already asleep.
        Raises RuntimeError if that is more than RESIDUAL allows.
        """
        assert not self._engine.has_unfinished_requests()
        if self._asleep:
            return 0.0
        self._engine.sleep(level=1 if keep_weights else 2)
        self._asleep = True
        used = self._engine.collective_rpc("memory_used")
        for taken, total in used:
            if taken > RESIDUAL * total:
                raise RuntimeError(
                    f"{taken / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU are still taken while sampler and "
                    "learner are both away from it; with cluster.sleep=false both stay in memory"
                )
        return float(max(taken for taken, _ in used) / 2**30)

    def wake(self, *tags: str) -> None:
        """Allocate the memory of the "weights" or the "kv_cache" again. Sampling needs both."""
        if self._asleep:
            self._asleep = not self._engine.wake_up(list(tags))

    def probe_logprobs(self, probe: Probe) -> tuple[NDArray[np.float32], ...]:
        """Return the logprobs [N][L_n - 1] of the probe tokens after the first, at temperature 1."""
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, ignore_eos=True)
        for i, ids in enumerate(probe.token_ids):
            self._engine.add_request(f"probe-{i}", {"prompt_token_ids": list(ids)}, params)
        found: dict[str, NDArray[np.float32]] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    rows = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
                    found[output.request_id] = np.asarray([row[i].logprob for row, i in rows], dtype=np.float32)
        self._engine.reset_prefix_cache()
        return tuple(found[f"probe-{i}"] for i in range(len(probe.token_ids)))

    def gpus(self) -> tuple[str, ...]:
        """Return the UUIDs of the GPUs that the workers compute on; empty on CPU."""
        return tuple(uuid for uuid in self._engine.collective_rpc("gpu_uuid") if uuid)

    def perturb_for_test(self, substring: str, factor: float) -> None:
        """Scale engine tensors in place, bypassing the protocol. Tests use this to make the checks fail."""
        self._engine.collective_rpc("recorder_perturb", args=(substring, factor))


def engine_arguments(config: Config, transport: str, index: int) -> EngineArgs:
    """Return vLLM's engine arguments. `transport`: see `grpo.sync.transport`; `index`: the sampler's number in the run.

    Raises UserError for an unknown `sampler.engine` option.
    """
    known = [f.name for f in dataclasses.fields(EngineArgs)]
    for name in config.sampler.engine:
        if name not in known:
            raise UserError(f"sampler.engine.{name} is not an argument of vLLM's EngineArgs{suggest(name, known)}")
    options: dict[str, Any] = {}
    if not config.on_gpu or config.sampler.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int((config.sampler.kv_cache_gib or 0.25) * 2**30)
    if config.model.float32_head:
        options["hf_overrides"] = {"head_dtype": "float32"}
    if config.on_gpu:
        options["gpu_memory_utilization"] = config.sampler.gpu_memory_utilization
    return EngineArgs(
        model=config.model.path,
        tokenizer=config.model.path,
        skip_tokenizer_init=not config.sampling.stop,
        load_format="safetensors",  # "auto" would unpickle a folder's .bin files
        trust_remote_code=config.model.trust_remote_code,
        dtype=config.model.dtype,
        seed=engine_seed(config.run.seed, index),
        max_model_len=config.max_row_tokens,
        max_num_seqs=config.sampler.max_num_seqs,
        max_num_batched_tokens=max(8192, config.max_row_tokens),
        enforce_eager=config.enforce_eager,
        async_scheduling=config.on_gpu,  # prepares the next step while the GPU computes
        enable_prefix_caching=config.sampler.prefix_caching,
        # when vLLM 0.32 splits a prompt it rewinds the request's random generator, which CPU generators do not support
        enable_chunked_prefill=config.on_gpu,
        distributed_executor_backend="uni" if config.sampler_workers == 1 else "mp",
        tensor_parallel_size=config.cluster.tensor_parallel,
        pipeline_parallel_size=config.cluster.pipeline_parallel,
        disable_log_stats=True,
        generation_config="vllm",  # never the model's own sampling settings
        logprobs_mode="processed_logprobs",  # of the distribution that the tokens are sampled from
        weight_transfer_config=WeightTransferConfig(backend=transfer.BACKENDS[transport]),
        worker_extension_cls="grpo.sampler.vllm.worker.WorkerExtension",
        enable_sleep_mode=config.on_gpu and config.takes_turns,
        **options,
        **config.sampler.engine,
    )


def engine_seed(run_seed: int, index: int) -> int:
    """Return the seed of a sampler's own generator, which unseeded requests use. It differs between samplers."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/{index}".encode(), digest_size=4).digest(), "big") >> 1


def sampled_block(outputs: Sequence[Any], policy_version: int) -> SampledBlock:
    """Return finished requests of the engine as columns."""
    names = [output.request_id.partition("/") for output in outputs]
    samples = [completion_of(output.outputs[0]) for output in outputs]
    lengths = [len(token_ids) for token_ids, _, _ in samples]
    total = sum(lengths)
    return SampledBlock(
        index=np.asarray([int(index) for index, _, _ in names], dtype=np.int32),
        sample_index=np.asarray([int(i) for _, _, i in names], dtype=np.int32),
        lengths=np.asarray(lengths, dtype=np.int32),
        token_ids=np.fromiter(chain.from_iterable(ids for ids, _, _ in samples), dtype=np.int32, count=total),
        sampler_logprobs=np.fromiter(chain.from_iterable(lp for _, lp, _ in samples), dtype=np.float32, count=total),
        policy_versions=np.full(total, policy_version, dtype=np.int32),
        truncated=np.asarray([reason == "length" for _, _, reason in samples], dtype=np.bool_),
        aborted=np.asarray([reason == "aborted" for _, _, reason in samples], dtype=np.bool_),
    )


def completion_of(sample: Any) -> tuple[Sequence[int], Sequence[float], str]:
    """Return (token ids, logprobs, finish reason) of a completion.

    The reason is "aborted" if the request ended for another reason than an end token or its length.
    """
    ids, logprobs, reason = sample.token_ids, sample.logprobs.logprobs, sample.finish_reason
    if reason in ("stop", "length") and len(ids) == len(logprobs) > 0:
        return ids, logprobs, reason
    said = "vLLM ended a request with %d tokens, %d logprobs and finish reason %r"
    logging.getLogger(__name__).warning(said, len(ids), len(logprobs), reason)
    count = min(len(ids), len(logprobs))
    return ids[:count], logprobs[:count], "aborted"


def sampling_params(settings: SamplingSettings, seed: int | None) -> Any:
    """Return vLLM's SamplingParams for one completion. Every field that matters is set explicitly."""
    return SamplingParams(
        n=1,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        max_tokens=settings.max_tokens,
        stop=list(settings.stop) or None,
        stop_token_ids=list(settings.end_token_ids),
        ignore_eos=True,  # the end tokens above are complete
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(settings.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
