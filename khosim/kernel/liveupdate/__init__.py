"""The Live Update Orchestrator of one kernel: sessions, files, shared state."""
