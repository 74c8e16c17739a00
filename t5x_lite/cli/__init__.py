"""The command line, one file a command. Only this room prints: results to stdout, progress and notes to stderr."""
