"""Features of images and texts: computed once, kept by what they come from."""
