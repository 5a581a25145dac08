collect_ignore_glob = ["*.py"]  # scripts, not tests
