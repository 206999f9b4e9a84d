"""`python -m blockllm_cli` is `blockllm`."""

import sys

from blockllm_cli.app import main

sys.exit(main())
