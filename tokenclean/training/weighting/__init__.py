"""Online token weights, one file each; the name of the file is the name of the weighting."""
