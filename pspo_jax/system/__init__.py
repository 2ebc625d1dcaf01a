"""This process and its machine: errors of storage in one line, the terminal, interrupts, progress bars."""
