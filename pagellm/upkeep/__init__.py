"""Keeping an installation in order: is all well, and forget this person."""
