"""Fixtures of more than one test module."""

from web_pictures import end, host, nothing_known

__all__ = ["end", "host", "nothing_known"]
