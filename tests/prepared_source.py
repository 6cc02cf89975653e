"""Run as a script: an interpreter with torch and transformers imported, which others fork from.

    python -I prepared_source.py

Each line of standard input asks for one run: JSON with `script`, `arguments`, `environment`,
`folder` (to run in), `out` and `err` (files). Each line of standard output is an exit status. The
folder of HF_HOME is emptied before each run; what a run's own environment says of Hugging Face's
folders comes too late.
"""

import json
import os
import runpy
import shutil
import sys
import traceback
from pathlib import Path

# What a run on a fresh interpreter imports first.
import torch  # noqa: F401
import transformers.modeling_utils  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, generation  # noqa: F401


def run(asked: dict) -> None:
    os.chdir(asked["folder"])
    for stream, descriptor in ((asked["out"], 1), (asked["err"], 2)):
        opened = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = [asked["script"], *asked["arguments"]]
    runpy.run_path(asked["script"], run_name="__main__")


def forked(asked: dict) -> int:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        run(asked)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    assert Path(os.environ["HF_HOME"]).is_absolute()
    for line in sys.stdin:
        answers.write(f"{forked(json.loads(line))}\n")
        answers.flush()
