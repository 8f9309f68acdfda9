"""Code that runs inside a rank for the processes outside that started it."""
