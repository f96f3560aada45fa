"""What pytest must not import: programs that tests start."""

collect_ignore = ["two_processes.py"]
