"""What breaks: programs over the public API, drawn and judged by a machine."""
