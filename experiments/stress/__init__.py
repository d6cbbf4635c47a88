"""Stress tests: killed processes, full disks, malformed input, many clients."""
