"""Runs on a Ray cluster: the children that measure are started on its nodes, one host timing one thing at a time."""
