"""What every benchmark shares: devices, timing, rows, tables, peers and plots."""
