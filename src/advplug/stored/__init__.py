"""What is kept of a run in its folder beside the cells of `advplug.store`, and how it is read again."""
