"""The console command: one parser, one module per command."""
