"""Coverage-guided fuzzing of everything that reads files from elsewhere: `python -m tests.fuzz`, `make fuzz`."""
