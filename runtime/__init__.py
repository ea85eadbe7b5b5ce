"""What exists while the program runs: dialect ops, sharded parameters, agreement between ranks."""
