"""The command line: words in, one job call, words out."""
