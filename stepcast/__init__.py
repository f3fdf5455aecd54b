"""Stepcast: recurrent sessions as data. The contract (manifest, protocol, errors) and the client."""

__version__ = "0.1.0"
