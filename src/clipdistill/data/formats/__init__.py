"""The forms that data sets come in, one file each."""
