"""What real kernels left behind: logs, memory maps, captures."""
