"""Online tests: A/B tests, simulated visitors, off-policy estimates, a judge of pages."""
