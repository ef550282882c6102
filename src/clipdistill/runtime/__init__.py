"""What every part stands on: files written whole, locks, signals, processes, the machine."""
