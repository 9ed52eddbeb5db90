"""One script a figure: arrays in, picture out; nothing here trains."""
