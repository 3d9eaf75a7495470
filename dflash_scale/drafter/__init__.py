"""The drafter: its layers, its output, and the folders that hold one."""
