"""Studies: many runs compared. They import pagellm through each module's __all__; nothing imports them."""
