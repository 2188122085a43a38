"""A user's own data: naming, checking, registering them, and writing a config for them."""

from mask2former.own_data.registration import register_custom_datasets
from mask2former.own_data.source import Source

__all__ = ["Source", "register_custom_datasets"]
