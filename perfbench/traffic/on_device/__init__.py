"""What runs in the child process, on the device."""
