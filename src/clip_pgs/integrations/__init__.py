"""Where the masking core meets other libraries."""
