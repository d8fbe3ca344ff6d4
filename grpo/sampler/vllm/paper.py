"""`python -m grpo.sampler.vllm.paper CONFIG`: check that vLLM can create the sampler's engine, without creating it.

The last line of its output is vLLM's objection as JSON, or null. It runs in a separate process because vLLM takes
seconds to import and changes the behaviour of transformers.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from grpo.config import Config, read_dump
from grpo.sampler.vllm.engine import engine_arguments
from grpo.types import UserError


def objection_to(config: Config) -> str | None:
    """Return the reason why vLLM would not create an engine, in one line; None if it would."""
    if config.on_gpu and not current_platform.is_cuda():
        return None  # this machine's vLLM is not built for CUDA, but the run's is
    try:
        settings = engine_arguments(config, "gloo", 0).create_engine_config()
        if config.sampler_workers == 1 and not config.on_gpu:  # has not been tried on GPUs
            build_without_weights(settings)
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - any error of vLLM
        text = " ".join(str(error).split())
        if not isinstance(error, ValueError):  # of KeyError and the like the text alone says little
            text = f"{type(error).__name__}: {text}"
        text = re.sub(r"^1 validation error for \w+ (Value error, |Assertion failed, )?", "", text).partition(
            " [type="
        )[0]
        hint = (
            "; nearest: sampler.prefix_caching=false" if config.sampler.prefix_caching and "mamba cache" in text else ""
        )
        return f"model.path={config.model.path}: vLLM cannot serve it: {text[:400].rstrip('.')}{hint}"
    return None


def build_without_weights(settings: VllmConfig) -> None:
    """Build the model's modules on the meta device: weights have shapes, but no memory. Raises any error of vLLM."""
    with tempfile.TemporaryDirectory(prefix="grpo-check-") as folder, set_current_vllm_config(settings):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            with torch.device("meta"), set_default_torch_dtype(settings.model_config.dtype):
                initialize_model(settings)
        except NotImplementedError as error:
            if "meta tensor" not in str(error):  # some modules compute constants, which the meta device cannot
                raise
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps(objection_to(read_dump(Path(sys.argv[1]))))}\n")
