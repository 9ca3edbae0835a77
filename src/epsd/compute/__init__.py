"""Where and how torch computes: devices, processes, memory, speed, derivatives."""
