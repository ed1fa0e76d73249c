"""Prepare a dataset once for a cluster: plan, write, verify, stage."""
