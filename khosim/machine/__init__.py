"""What survives a kexec: RAM, memory map, nodes, devices."""
