"""Names, shapes and views: what a tensor is made of. Pure arithmetic, no files."""
