"""What can be set and typed, as data: every setting with its meaning, and the options of every command."""
