"""The command line: `speechlab --help`."""
