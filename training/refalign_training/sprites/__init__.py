"""The small world in which everything works offline: its pictures, and the command that makes its models anew."""
