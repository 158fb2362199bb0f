"""Upstream calling conventions on our operators: one module for each upstream."""
