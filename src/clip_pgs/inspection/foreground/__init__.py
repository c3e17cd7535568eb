"""How much of an annotated foreground a masking keeps."""
