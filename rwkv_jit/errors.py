"""Exceptions of rwkv_jit. Every message names operator, argument, value, rule and remedy."""

from __future__ import annotations


class RwkvJitError(Exception):
    """Base class of every error that rwkv_jit raises on purpose."""


class ConfigError(RwkvJitError, ValueError):
    """A configuration that no kernel can be rendered for."""


class ArgumentError(RwkvJitError, ValueError):
    """Tensors that do not fit the operator they were passed to."""


class SettingsError(RwkvJitError, ValueError):
    """An environment variable with a value that has no meaning."""


class ToolchainError(RwkvJitError, RuntimeError):
    """No usable compiler, or one that does not fit the installed torch."""


class KernelBuildError(RwkvJitError, RuntimeError):
    """A compiler failed. The message holds its first error, the command and the log's path."""


class KernelMissingError(RwkvJitError, RuntimeError):
    """A kernel is not loaded or cached, and the settings in force forbid building it now."""


class KernelLoadError(RwkvJitError, RuntimeError):
    """A shared object is not the kernel that its manifest promises."""


class KernelLaunchError(RwkvJitError, RuntimeError):
    """A kernel refused its arguments, or the device refused the launch."""


class CacheError(RwkvJitError, RuntimeError):
    """The cache directory cannot be used safely."""


class BundleError(RwkvJitError, RuntimeError):
    """A bundle of prebuilt kernels cannot be made, or cannot be used safely."""


class PoolError(RwkvJitError, RuntimeError):
    """A pool of states has no room, or a slot is used that is not owned."""


class BenchError(RwkvJitError, RuntimeError):
    """A benchmark cannot be run as it was asked for."""
