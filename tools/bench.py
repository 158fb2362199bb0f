"""The benchmark from a checkout: `python tools/bench.py ...` is `rwkv-jit bench ...`."""

import sys

from rwkv_jit.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
