"""Routing traces: recorded from live workers, replayed through the policies."""
