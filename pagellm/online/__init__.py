"""Online tests and what stands in for them: A/B tests, a simulator, off-policy estimates, a judge."""
