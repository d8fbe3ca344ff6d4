"""`python -m grpo.sampler.paper CONFIG`: would vLLM make the sampler's engine? Without the engine, and its memory.

Prints why not as the last line of its output, as JSON: null where nothing speaks against it. A process of its own,
since vLLM takes seconds to import and changes what transformers does.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from vllm.platforms import current_platform

from grpo.config import Config, read_dump
from grpo.sampler.engine import engine_arguments
from grpo.types import UserError


def objection_to(config: Config) -> str | None:
    """Why vLLM would not make an engine, in one line."""
    if config.on_gpu and not current_platform.is_cuda():
        return None  # vLLM of another kind of machine than the run's
    try:
        engine_arguments(config, "gloo", 0).create_engine_config()
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever vLLM comes upon
        text = " ".join(str(error).split()) or type(error).__name__
        text = re.sub(r"^1 validation error for \w+ (Value error, |Assertion failed, )?", "", text).partition(
            " [type="
        )[0]
        hint = (
            "; nearest: sampler.prefix_caching=false" if config.sampler.prefix_caching and "mamba cache" in text else ""
        )
        return f"model.path={config.model.path}: vLLM cannot serve it: {text[:400].rstrip('.')}{hint}"
    return None


if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps(objection_to(read_dump(Path(sys.argv[1]))))}\n")
