"""`--doctor`: examines this machine, or a kernel image."""
