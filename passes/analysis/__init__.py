"""Facts about a channel graph; nothing here changes a model."""
