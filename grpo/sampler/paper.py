"""`python -m grpo.sampler.paper CONFIG`: would vLLM make the sampler's engine? Without the engine, and its memory.

Prints why not as the last line of its output, as JSON: null where nothing speaks against it. A process of its own,
since vLLM takes seconds to import and changes what transformers does.
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
from grpo.sampler.engine import engine_arguments
from grpo.types import UserError


def objection_to(config: Config) -> str | None:
    """Why vLLM would not make an engine, in one line."""
    if config.on_gpu and not current_platform.is_cuda():
        return None  # vLLM of another kind of machine than the run's
    try:
        settings = engine_arguments(config, "gloo", 0).create_engine_config()
        if config.sampler_workers == 1:
            build_without_weights(settings)
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever vLLM comes upon
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
    """Build the model's modules with the shapes of their weights alone. Raises whatever vLLM comes upon."""
    with tempfile.TemporaryDirectory(prefix="grpo-check-") as folder, set_current_vllm_config(settings):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            with torch.device("meta"), set_default_torch_dtype(settings.model_config.dtype):
                initialize_model(settings)
        except NotImplementedError as error:
            if "meta tensor" not in str(error):  # some modules compute constants, which this device cannot
                raise
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps(objection_to(read_dump(Path(sys.argv[1]))))}\n")
