"""Starting runs: the command line, the processes, and what each process executes."""
