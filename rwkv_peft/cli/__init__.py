"""The command line: one file a command, built from dataclasses."""
