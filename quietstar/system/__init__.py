"""What the operating system gives and takes: files written whole, locks, signals."""
