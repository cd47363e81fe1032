"""One algorithm per file; the registry imports every file of this folder."""
