"""The command line: `exitify transform | train | calibrate | run | bench | inspect | export | targets`."""

from exitify.cli.app import main

__all__ = ["main"]
