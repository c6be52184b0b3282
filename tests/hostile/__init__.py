"""Broken and hostile input, and hosts that fail: nothing is lost, and everything is told in one sentence."""
