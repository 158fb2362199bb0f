"""`python -m rwkv_jit` is `rwkv-jit`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
