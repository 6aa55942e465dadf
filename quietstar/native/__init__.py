"""What CPUs do by compiled loops, where torch's operators cost more than their work."""
