"""This process and its machine: storage and its errors, the terminal, interrupts, progress bars."""
