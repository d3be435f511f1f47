"""Files that are read and written: run folders, arrays, results of other tools, and where commands write."""
