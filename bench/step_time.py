"""Time of an update: BlockLLM at several budgets against AdamW, a frozen body, and a plain loop with torch's AdamW.

    python bench/step_time.py --minutes 10 --threads 1
    python bench/step_time.py --minutes 5 --threads 1 --case bf16

The section `blockllm` of `bench/run.py` by a shorter name, with the same options; `speed/sections/blockllm.py` says
what the columns are.
"""

from __future__ import annotations

import sys

from speed.driver import main

if __name__ == "__main__":
    raise SystemExit(main(["--only", "blockllm", *sys.argv[1:]]))
