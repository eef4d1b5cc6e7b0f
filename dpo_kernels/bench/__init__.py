"""Throughput and memory beside the peers: what `pytest benchmarks/` and `dpo-kernels bench` run.

cases      which shapes, of which models
providers  who computes them: ours, torch, and every peer that is installed
measure    checks each against float64, then times them in turns, against a floor
results    a run as JSON; tables
report     a page and charts of results files
"""
