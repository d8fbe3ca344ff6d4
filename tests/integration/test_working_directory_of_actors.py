"""Where a private Ray's actors look for modules: not in the folder that the run was started in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, subprocess, sys, tempfile
from pathlib import Path
import ray
from grpo import config
from grpo.cluster.environment import sampler_environment
from grpo.cluster import session as cluster

@ray.remote
class Actor:
    def look(self):
        import colorsys, fractions
        subprocess.run([sys.executable, "-m", "colorsys"], check=True)  # as vLLM starts what looks at a model
        return [colorsys.__file__, fractions.__file__, *sys.path]

options = config.load(sys.argv[1])
with tempfile.TemporaryDirectory() as logs, cluster.session(options, Path(logs)):
    actor = Actor.options(runtime_env={"env_vars": sampler_environment(options)}).remote()
    print(*ray.get(actor.look.remote()), sep="\\n")
"""


def test_actors_do_not_look_in_the_working_directory(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    hiding = tmp_path / "hiding"
    hiding.mkdir()
    for name in ("colorsys", "fractions"):
        (hiding / f"{name}.py").write_text("raise SystemExit('imported')\n")
    ended = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(make_recipe(Path("nowhere")))], cwd=hiding, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    places = ended.stdout.splitlines()
    assert str(ROOT) in places
    assert not [place for place in places if Path(place).is_relative_to(hiding)]
